"""One request inside the engine: its tokens, how far they are computed, and what it owns."""

from __future__ import annotations

from dataclasses import dataclass, field

from server.core import Phase, Request, RowPlan, TokenLogprobs
from server.engine.draft_kv import DraftSpan


def end_ids(request: Request, eos_token_ids: frozenset[int]) -> frozenset[int]:
    """Tokens that end the request's answer: its stop tokens, and end-of-sequence unless it ignores that."""
    eos = frozenset() if request.ignore_eos else eos_token_ids
    return eos.union(request.stop_token_ids) if request.stop_token_ids else eos


@dataclass(slots=True, eq=False)
class Sequence:
    """A request on its way.

    `token_ids` are all known tokens (prompt, then emitted). Keys and values of the first `num_computed` of them are in
    the KV pool. Prefilling: more than one token is still to be computed. Decoding: exactly the last one is.

        token_ids   |---------- prompt ----------|-- emitted --|
        computed    |-------- num_computed --------->          .    last token: input of the next verify step

    It may grow to `max_len` tokens. `ends` are the tokens that end it. `admitted`: it held a slot before, so its prompt
    is charged and `num_cached` is settled; `started`: the runner has seen it; `announced`: its first output is out.
    `prompt_logprobs` are those of the prompt tokens from the second on, as far as they are computed (None: not asked
    for, or handed over).

    While a step runs that was launched and not read yet, `num_launched` is how many prompt tokens it computes, and it
    emits `due` to `ahead` tokens. `tenure` counts the slots the sequence has lost: what a step says of an earlier
    tenure is void. `draft_kv`: what the drafter has of its tokens, if it keeps keys and values; the first `num_marked`
    blocks were asked whether they serve it too.
    """

    request: Request
    token_ids: list[int]
    ends: frozenset[int] = frozenset()
    slot: int = -1
    num_computed: int = 0
    blocks: list[int] = field(default_factory=list)
    contiguous: bool = True
    keys: list[bytes] = field(default_factory=list)
    num_cached: int = 0
    admitted: bool = False
    started: bool = False
    announced: bool = False
    prompt_logprobs: list[TokenLogprobs] | None = None
    num_launched: int = 0
    due: int = 0
    ahead: int = 0
    tenure: int = 0
    num_synced: int = 0
    draft_kv: DraftSpan | None = None
    num_marked: int = 0
    prompt_len: int = field(init=False)
    max_len: int = field(init=False)

    def __post_init__(self) -> None:
        self.prompt_len = len(self.request.prompt_ids)
        self.max_len = self.prompt_len + self.request.max_tokens

    @staticmethod
    def of(request: Request, eos_token_ids: frozenset[int] = frozenset()) -> Sequence:
        seq = Sequence(request, list(request.prompt_ids), end_ids(request, eos_token_ids))
        if request.prompt_logprobs is not None:
            seq.prompt_logprobs = []
        return seq

    @property
    def num_tokens(self) -> int:
        return len(self.token_ids)

    @property
    def num_emitted(self) -> int:
        return len(self.token_ids) - self.prompt_len

    @property
    def early(self) -> bool:
        """There are tokens that would end it, and it is too short to end (`min_tokens`)."""
        return bool(self.ends) and self.num_emitted < self.request.min_tokens

    @property
    def num_left(self) -> int:
        """Tokens it may still emit."""
        return self.max_len - len(self.token_ids)

    @property
    def running(self) -> bool:
        return self.slot >= 0

    @property
    def num_to_compute(self) -> int:
        """Known tokens whose keys and values no step has computed, or is computing."""
        return len(self.token_ids) - self.num_computed - self.num_launched

    @property
    def decoding(self) -> bool:
        """One token is left to compute, or none where the step that emits the next one runs already."""
        return len(self.token_ids) - self.num_computed - self.num_launched <= 1

    @property
    def most_tokens(self) -> int:
        """Known tokens, and those that the step which is under way may emit."""
        return len(self.token_ids) + self.ahead

    @property
    def in_flight(self) -> bool:
        return self.ahead > 0 or self.num_launched > 0

    @property
    def scoring(self) -> bool:
        """Whether log-probabilities of prompt tokens are still to be computed."""
        return self.prompt_logprobs is not None and len(self.prompt_logprobs) < self.prompt_len - 1

    @property
    def num_reusable(self) -> int:
        """How many of its first tokens need not run if their keys and values are found.

        At least the last one must, to give logits; so must those whose logits score the prompt.
        """
        if self.prompt_logprobs is not None and self.scoring:
            return len(self.prompt_logprobs)
        return len(self.token_ids) - 1

    def launched(self, row: RowPlan, phase: Phase) -> None:
        """A step with `row` of this sequence runs; `settled` undoes it when its result is read."""
        if phase is Phase.PREFILL:
            self.num_launched += row.num_tokens
        if row.samples:
            self.due += 1
            self.ahead += 1 + row.max_drafts

    def settled(self, row: RowPlan, phase: Phase) -> None:
        """The result of a step that `launched` told of is known."""
        if phase is Phase.PREFILL:
            self.num_launched -= row.num_tokens
        if row.samples:
            self.due -= 1
            self.ahead -= 1 + row.max_drafts

    def forget_launched(self) -> None:
        """It lost its slot: whatever step still runs, its result is void."""
        self.num_launched = self.due = self.ahead = self.num_synced = 0
        self.tenure += 1

    def take_back_block(self) -> int:
        """Its last block, which it does not own any more; the next in its place may be another."""
        block = self.blocks.pop()
        self.num_synced = min(self.num_synced, len(self.blocks))
        return block

    def add_block(self, block: int) -> None:
        if self.blocks and block != self.blocks[-1] + 1:
            self.contiguous = False
        self.blocks.append(block)
