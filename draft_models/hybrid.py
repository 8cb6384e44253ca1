"""Copy where the text repeats itself, predict where it does not: suffix hits and a learned drafter, row by row.

Copying beats predicting on extraction, retrieval and edits, and costs nothing; everywhere else a learned chain is
better (SAM-Decoding, arXiv 2411.10666, section 3.4, combines a suffix automaton with EAGLE by a fixed match length).
Which of the two a row gets is decided by what has been accepted of either so far, per class of match (see Arbiter).

The choice looks at the known tokens only, never at what either drafter would propose. So under rule `ratio` the
distribution a draft was drawn from is a point mass where it was copied and the chain's own where it was not.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor

from draft_models.protocol import Drafter
from draft_models.suffix import Match, SuffixDrafter
from server.spec.types import Carry, Drafts, Verdict

if TYPE_CHECKING:
    from server.sampling.state import SamplingBatch

Keep = Callable[[Carry, Sequence[int], Tensor], None]
LEARNED = "learned"
"""Acceptance class of drafts that were not copied."""
LONG_MATCH = 5
"""From here on a match is copied where nothing has been learned yet."""


class Arbiter(Protocol):
    """Decides between copies and chain, by acceptance and cost."""

    def divide(self, matches: Sequence[Match | None], limits: Sequence[int], context: float) -> tuple[int, list[bool]]:
        """Of a ragged step: how long a chain to run, and which rows copy.

        A row without `tokens` to copy has None; `limits` are the most drafts of each row; `context` is their mean
        length.
        """

    def lengths(self, match: Match, k: int) -> int:
        """Of a step of `k` drafts a row: bit n says whether `match` is copied if it is n tokens long by then.

        Bit 9 is of longer ones too.
        """

    def lengths_of(self, family: int, k: int) -> int:
        """The same of any match of a `Match.family`, where none is known yet."""


@dataclass(frozen=True, slots=True)
class ByLength:
    """Arbiter of an engine that measures nothing: matches of LONG_MATCH tokens are copied."""

    max_draft_tokens: int

    def divide(self, matches: Sequence[Match | None], limits: Sequence[int], context: float) -> tuple[int, list[bool]]:
        """See Arbiter."""
        return self.max_draft_tokens, [match is not None and match.length >= LONG_MATCH for match in matches]

    def lengths(self, match: Match, k: int) -> int:
        """See Arbiter."""
        return self.lengths_of(match.family, k)

    def lengths_of(self, family: int, k: int) -> int:
        """See Arbiter."""
        return sum(1 << n for n in range(LONG_MATCH, 10))


class HybridDrafter:
    """Implements draft_models.protocol.Drafter, on the CPU. The chain runs only for rows that do not copy.

    What a row copied and the target accepted, `learned` sees as known tokens when it drafts for that row again, as
    after any other pause. Rows copy up to `max_draft_tokens`, whatever length the chain has: copies are free, and what
    is not worth verifying is cut afterwards. `chain` says whether the last step's drafts had a chain among them: only
    then do prompts run through its network.
    """

    name = "hybrid"
    has_distribution = True

    def __init__(self, suffix: SuffixDrafter, learned: Drafter, max_draft_tokens: int) -> None:
        self.suffix, self.learned = suffix, learned
        self.feature_layers = learned.feature_layers
        self.arbiter: Arbiter = ByLength(max_draft_tokens)
        self.chain = True
        self._keep: Keep | None = getattr(learned, "keep", None)

    @property
    def pools(self) -> list[Tensor]:
        """The learned drafter's."""
        found: list[Tensor] = getattr(self.learned, "pools", [])
        return found

    # -- host events ---------------------------------------------------------------------------------------

    def admit(self, slot: int, token_ids: Sequence[int], prompt_len: int, prediction: Sequence[int] = ()) -> None:
        """See Drafter."""
        for part in (self.suffix, self.learned):
            part.admit(slot, token_ids, prompt_len, prediction)

    def reuse(self, slot: int, first: int, end: int) -> None:
        """Keys and values are the learned drafter's."""
        self.learned.reuse(slot, first, end)

    def observe(self, slot: int, token_ids: Sequence[int]) -> None:
        """See Drafter."""
        for part in (self.suffix, self.learned):
            part.observe(slot, token_ids)

    def release(self, slot: int, complete: bool = False) -> None:
        """See Drafter."""
        for part in (self.suffix, self.learned):
            part.release(slot, complete)

    def pause(self) -> None:
        """Neither part runs until the next `propose`."""
        if self.chain:
            self.learned.pause()
        self.chain = False

    # -- in the step ---------------------------------------------------------------------------------------

    def prefill(
        self, carry: Carry, token_ids: Tensor, positions: Tensor, rows: Tensor, features: Tensor | None
    ) -> None:
        """Prompt chunks for the chain's network."""
        if self.chain:
            self.learned.prefill(carry, token_ids, positions, rows, features)
        elif features is not None:
            self.keep(carry, [length for _, length in carry.chunks], features)

    def keep(self, carry: Carry, counts: Sequence[int], features: Tensor) -> None:
        """While nothing or only copies are drafted: features [N, F] of `counts` [R] tokens a row, for a learned drafter
        that has a use for them when its chain runs again."""
        if self._keep is not None:
            self._keep(carry, counts, features)

    def propose(self, carry: Carry, k: int, sampling: SamplingBatch) -> Drafts:
        """At most `k` drafts a row, copied or of a chain that the arbiter may make shorter."""
        matches = [self._match(slot, min(k, n)) for slot, n in zip(carry.slots, carry.limits, strict=True)]
        limits = [min(k, limit) for limit in carry.limits]
        context = sum(carry.tokens_host) / len(carry.slots)
        length, copying = self.arbiter.divide(matches, limits, context)
        length = min(length, k)
        self._run_chain(length > 0)
        if length == 0:
            copying = [match is not None for match in matches]
        chained = [0 if copies else min(n, length) for copies, n in zip(copying, limits, strict=True)]
        copied = [match if copies else None for match, copies in zip(matches, copying, strict=True)]
        drafts = None
        if any(chained):
            drafts = self.learned.propose(replace(carry, limits=chained), length, sampling)
        return self._merge(carry, copied, drafts, chained)

    def _match(self, slot: int, num_tokens: int) -> Match | None:
        match = self.suffix.match(slot, num_tokens) if num_tokens > 0 else None
        return match if match is not None and match.tokens else None

    def _run_chain(self, runs: bool) -> None:
        if self.chain and not runs:
            self.learned.pause()
        self.chain = runs

    def _merge(
        self, carry: Carry, copied: Sequence[Match | None], chain: Drafts | None, chained: Sequence[int]
    ) -> Drafts:
        """One set of drafts of what was copied and, for the other rows, of `chain`, which may be wider or narrower;
        `chained` are the most drafts that it was asked for."""
        device = carry.state.history.device
        found = chain if chain is not None else Drafts.none(len(copied), device)
        own = found.num_valid_host if found.num_valid_host is not None else found.num_valid.tolist()
        valid = [n if match is None else len(match.tokens) for n, match in zip(own, copied, strict=True)]
        width, have = max(valid, default=0), found.tokens.shape[1]
        tokens = F.pad(found.tokens, (0, max(0, width - have)))[:, :width]
        probs = None if found.probs is None else F.pad(found.probs, (0, 0, 0, max(0, width - have)))[:, :width]
        for r, match in enumerate(copied):
            if match is None:
                continue
            row = torch.tensor(match.tokens, dtype=torch.int64, device=device)
            tokens[r, : len(row)] = row
            if probs is not None:
                probs[r].zero_()
                probs[r, : len(row)].scatter_(1, row[:, None], 1.0)
        return Drafts(
            tokens,
            torch.tensor(valid, dtype=torch.int64, device=device),
            valid,
            probs,
            [LEARNED if match is None else match.name for match in copied],
            chained=[n > 0 for n in chained],
        )

    def commit(self, carry: Carry, drafts: Drafts, verdict: Verdict, features: Tensor | None) -> None:
        """The chain's own state is rolled to the committed end, of rows that copied too."""
        if self.chain:
            self.learned.commit(carry, drafts, verdict, features)
        elif features is not None and self._keep is not None:
            counts: list[int] = verdict.num_emitted.tolist()
            self.keep(carry, counts, torch.cat([row[:n] for row, n in zip(features, counts, strict=True)]))
