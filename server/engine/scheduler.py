"""Decides what runs next: admission, prompt chunks, verify batches, preemption. Pure bookkeeping, no tensors.

Who is admitted next is the waiting queue's choice (`server.engine.waiting`); who would fit better does not overtake it.
Prompt chunks and verify steps alternate while both have work, so a long prompt never stalls decoding for longer than
one token budget. When blocks run out, those held for drafts are taken back first; then the youngest running sequence
gives up its own and is computed anew later.

Background requests (copies of users' requests, for comparison) have a queue of their own. They are admitted and get
rows only while no user's sequence runs or waits; else they stand still, and lose their slots and blocks as soon as a
user's sequence needs them. So a user waits for no more of them than the step that was under way. What they compute does
not enter the prefix cache: it would push out what users come back to.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass

from server.core import Phase, Request, RowPlan, StepPlan
from server.engine.blocks import BlockPool
from server.engine.draft_kv import MakeSpan
from server.engine.draft_marks import DraftMarks
from server.engine.limits import Limits
from server.engine.prefix_cache import ROOT, PrefixCache, block_key
from server.engine.sequence import Sequence
from server.engine.slots import SlotPool
from server.engine.waiting import WaitingQueue

PROMPT_LOGPROB_ROWS = 256
"""Most prompt positions whose logits a step keeps, all rows together: they are as wide as the vocabulary."""

BACKGROUND_TOKENS = 64
"""Most prompt tokens of background requests in a step: a user who comes then waits for it."""


@dataclass(slots=True)
class Counters:
    """Since start."""

    num_preemptions: int = 0
    num_cached_tokens: int = 0
    num_prefill_tokens: int = 0


DraftTokens = Callable[[int, int], int]
"""(rows of the verify step, rows among them that may draft) -> most drafts a row."""
Follows = Callable[[Phase, int], bool]
"""(phase, rows) -> whether the drafter sees a step without drafts: prompt chunks, or a verify step of k = 0."""


class Scheduler:
    """Owns every sequence from submission to its end: it waits, runs, or is held back. `drafts`: somebody drafts, who
    keeps keys and values of its own in the blocks if there is a `make_span`.

    `admitted` and `released` say, until the caller clears them, which sequences took and which slots lost their place;
    of a slot, whether its sequence had come to its natural end.
    """

    def __init__(
        self, limits: Limits, eos_token_ids: Iterable[int] = (), drafts: bool = True, make_span: MakeSpan | None = None
    ) -> None:
        self.limits = limits
        self.cache = PrefixCache(limits.block_size, limits.prefix_cache)
        self.pool = BlockPool(limits.num_blocks, on_evict=self.cache.forget)
        self.marks = DraftMarks(self.pool, limits.block_size, make_span)
        self.slots = SlotPool(limits.max_num_seqs)
        self.waiting = WaitingQueue()
        self.background = WaitingQueue()
        self.running: list[Sequence] = []
        self.num_behind = 0
        """Running sequences that are in the background."""
        self.held: dict[str, Sequence] = {}
        self.by_id: dict[str, Sequence] = {}
        self.admitted: list[Sequence] = []
        self.released: dict[int, bool] = {}
        self.counters = Counters()
        self._eos = frozenset(eos_token_ids)
        self._drafts = drafts
        self._last_phase = Phase.VERIFY

    # -- requests ------------------------------------------------------------------------------------------

    def refusal(self, request: Request) -> str | None:
        """Why this request can not be taken, or None."""
        if request.request_id in self.by_id:
            return f"request id {request.request_id!r} is in use"
        return self.limits.refusal(request)

    def submit(self, request: Request) -> None:
        """Queues a request that `refusal` lets through."""
        seq = Sequence.of(request, self._eos)
        self.by_id[request.request_id] = seq
        self._queue(seq).append(seq)

    def finish(self, seq: Sequence, complete: bool = False) -> None:
        """Ends a sequence in whatever state it is; its slot and blocks are free at once.

        `complete`: it said all it had to say, rather than being stopped from outside.
        """
        del self.by_id[seq.request.request_id]
        self._withdraw(seq, complete)

    def _withdraw(self, seq: Sequence, complete: bool = False) -> None:
        if seq.running:
            self.running.remove(seq)
            self.num_behind -= seq.request.background
            self._give_up(seq, complete)
        elif self.held.pop(seq.request.request_id, None) is None:
            self._queue(seq).remove(seq)

    def hold(self, seq: Sequence) -> None:
        """Takes a sequence out of the way until `resume`: it gives up its place and is computed anew later."""
        self._withdraw(seq)
        self.held[seq.request.request_id] = seq

    def resume(self, request_id: str) -> None:
        """A held sequence waits again, before all others of its tenant; other ids are ignored."""
        seq = self.held.pop(request_id, None)
        if seq is not None:
            self._queue(seq).append_front(seq)

    def condemn(self, seq: Sequence) -> list[int]:
        """Ends a running sequence whose content is not to be trusted: none of its blocks can be found again.

        Returns the blocks that are now nobody's, to be cleaned.
        """
        blocks = list(seq.blocks)
        for block in blocks:
            if self.pool.discard(block):
                self.cache.forget(block)
        self.finish(seq)
        return [block for block in blocks if self.pool.refs(block) == 0]

    @property
    def has_work(self) -> bool:
        return bool(self.waiting or self.running or self.background)

    @property
    def users(self) -> list[Sequence]:
        """Running sequences of users."""
        return [seq for seq in self.running if not seq.request.background] if self.num_behind else self.running

    def _queue(self, seq: Sequence) -> WaitingQueue:
        return self.background if seq.request.background else self.waiting

    @property
    def _active(self) -> list[Sequence]:
        """Running sequences that steps have rows for."""
        return self.users or self.running

    # -- a step --------------------------------------------------------------------------------------------

    def schedule(
        self, draft_tokens: DraftTokens, follows: Follows = lambda phase, num_rows: True
    ) -> tuple[StepPlan, list[Sequence]] | None:
        """The next step, or None if nothing can run; its rows and the sequences pair up.

        `draft_tokens` is asked for a verify step once its rows are known, `follows` if it said 0 and for prompts.
        """
        self._admit()
        decoding = any(s.decoding for s in self._active)
        prefill_first = self._last_phase is Phase.VERIFY or not decoding
        planned = self._plan_prefill(follows) if prefill_first else self._plan_verify(draft_tokens, follows)
        if planned is None:
            planned = self._plan_verify(draft_tokens, follows) if prefill_first else self._plan_prefill(follows)
        if planned is not None:
            self._last_phase = planned[0].phase
        return planned

    def launched(self, plan: StepPlan, sequences: list[Sequence]) -> None:
        """A step runs, of which nothing is known until each sequence has `settled` its row."""
        for row, seq in zip(plan.rows, sequences, strict=True):
            seq.launched(row, plan.phase)

    def num_decoding(self) -> int:
        """Rows that a verify step would have; prompts in progress do not count."""
        return sum(s.decoding for s in self._active)

    def _admit(self) -> None:
        while self.waiting:
            if not self._admit_next(self.waiting) and not self._clear_the_way():
                return
        while self.background and not self.users and self._admit_next(self.background):
            pass

    def _admit_next(self, queue: WaitingQueue) -> bool:
        """Whether there was room for the next of `queue`."""
        if not self.slots.num_free:
            return False
        seq = queue.peek()
        blocks, keys = self.cache.match(seq.token_ids, seq.num_reusable)
        if self._being_computed(seq, len(blocks) * self.limits.block_size):
            return False
        revived = sum(self.pool.refs(b) == 0 for b in blocks)
        needed = self._blocks_for(seq.num_tokens + 1) - len(blocks)
        # Each running sequence may need one more block at its next step; users take it from those in the background.
        headroom = len(self._active if seq.request.background else self.users)
        if needed + revived + headroom > self.pool.num_free:
            return False
        queue.remove(seq)
        for block in blocks:
            self.pool.acquire(block)
            seq.add_block(block)
        seq.keys = keys
        seq.num_computed = len(blocks) * self.limits.block_size
        self.marks.begin(seq)
        if not seq.admitted:  # else the blocks are its own, and what it computes again it paid for
            seq.admitted = True
            seq.num_cached = seq.num_computed
            queue.charge(seq, seq.num_tokens - seq.num_computed)
            if not seq.request.background:
                self.counters.num_cached_tokens += seq.num_computed
        self._reserve(seq, seq.num_tokens)
        seq.slot = self.slots.acquire()
        self.running.append(seq)
        self.num_behind += seq.request.background
        self.admitted.append(seq)
        return True

    def _being_computed(self, seq: Sequence, known: int) -> bool:
        """Whether a running prompt is about to put the next block of `seq` into the prefix cache: worth waiting for.

        `n` choices of one prompt arrive together; without this each would compute the prompt anew.
        """
        end = known + self.limits.block_size
        if not self.limits.prefix_cache or end > seq.num_reusable:
            return False
        wanted = seq.token_ids[:end]
        return any(r.num_computed < end and r.num_tokens > end and r.token_ids[:end] == wanted for r in self.users)

    def _plan_prefill(self, follows: Follows) -> tuple[StepPlan, list[Sequence]] | None:
        budget, scored = self.limits.max_num_batched_tokens, PROMPT_LOGPROB_ROWS
        if self._active and self._active[0].request.background:
            budget = min(budget, BACKGROUND_TOKENS)
        rows: list[RowPlan] = []
        sequences: list[Sequence] = []
        for seq in [s for s in self._active if not s.decoding]:
            chunk = min(budget, seq.num_to_compute)
            if seq.scoring:
                if seq.in_flight:  # which tokens are scored already is known once that is read
                    continue
                chunk = min(chunk, scored)
                scored -= chunk
            if chunk == 0:
                continue
            budget -= chunk
            last = chunk == seq.num_to_compute
            rows.append(RowPlan(seq.slot, seq.num_computed + seq.num_launched, chunk, samples=last))
            sequences.append(seq)
            self.counters.num_prefill_tokens += 0 if seq.request.background else chunk
        if not rows:
            return None
        follow = self._drafts and follows(Phase.PREFILL, len(self._active))
        return StepPlan(Phase.PREFILL, rows, follows=follow), sequences

    def _plan_verify(self, draft_tokens: DraftTokens, follows: Follows) -> tuple[StepPlan, list[Sequence]] | None:
        sequences: list[Sequence] = []
        for seq in self._active[:]:
            while (goes_on := self._goes_on(seq)) and not self._try_reserve(seq, seq.most_tokens):
                if self._take_back_draft_blocks():
                    continue
                if not seq.request.background and self._clear_the_way():
                    continue
                if any(s.in_flight for s in self.running):
                    return None  # what that step emits or ends is worth waiting for before anything is computed anew
                self.preempt(
                    self.running[-1]
                )  # the youngest; never one before `seq` in this order; at worst `seq` itself
            if goes_on:
                sequences.append(seq)
        if not sequences:
            return None
        limits = [_most_drafts(seq) for seq in sequences] if self._drafts else [0] * len(sequences)
        num_eligible = sum(most > 0 for most in limits)
        k = draft_tokens(len(sequences), num_eligible)
        rows = [
            RowPlan(seq.slot, len(seq.token_ids) - 1, 1, True, self._reserve_drafts(seq, min(most, k)) if k else 0)
            for seq, most in zip(sequences, limits, strict=True)
        ]
        if k > 0 and not any(row.max_drafts for row in rows):  # no blocks for drafts
            k = 0
            return StepPlan(Phase.VERIFY, rows), sequences
        follow = k > 0 or (num_eligible > 0 and follows(Phase.VERIFY, len(rows)))
        return StepPlan(Phase.VERIFY, rows, k, follow), sequences

    def _goes_on(self, seq: Sequence) -> bool:
        """Whether a verify step has a row for it: it decodes, and the step under way can not be its last for
        certain.
        """
        return seq.slot >= 0 and seq.decoding and seq.num_left > seq.due

    def _reserve_drafts(self, seq: Sequence, drafts: int) -> int:
        """Blocks for as many drafts as there is room for, once every row has room for its own token."""
        while drafts and not self._try_reserve(seq, seq.most_tokens + drafts):
            drafts -= 1
        return drafts

    def commit(self, seq: Sequence, num_run: int, emitted: list[int]) -> None:
        """A step ran `num_run` committed tokens of `seq` (chunk, or last token and accepted drafts) and emitted
        these."""
        seq.num_computed += num_run
        if emitted:
            seq.token_ids.extend(emitted)
            self._queue(seq).charge(seq, len(emitted))
        size = self.limits.block_size
        while (len(seq.keys) + 1) * size <= seq.num_computed:
            i = len(seq.keys)
            key = block_key(seq.keys[-1] if seq.keys else ROOT, seq.token_ids[i * size : (i + 1) * size])
            if not seq.request.background and self.cache.insert(key, seq.blocks[i]):
                self.pool.keep(seq.blocks[i])
            seq.keys.append(key)

    # -- blocks --------------------------------------------------------------------------------------------

    def _blocks_for(self, num_tokens: int) -> int:
        return -(-num_tokens // self.limits.block_size)

    def _reserve(self, seq: Sequence, num_tokens: int) -> None:
        while len(seq.blocks) < self._blocks_for(num_tokens):
            seq.add_block(self.pool.allocate(seq.blocks[-1] if seq.blocks else None))

    def _try_reserve(self, seq: Sequence, num_tokens: int) -> bool:
        if len(seq.blocks) * self.limits.block_size >= num_tokens:
            return True
        if self._blocks_for(num_tokens) - len(seq.blocks) > self.pool.num_free:
            return False
        self._reserve(seq, num_tokens)
        return True

    def _take_back_draft_blocks(self) -> bool:
        """Frees blocks that rows hold beyond their known tokens, for rejected drafts; whether there were any."""
        found = False
        for seq in self.running:
            while len(seq.blocks) > self._blocks_for(seq.most_tokens):
                self.pool.release(seq.take_back_block())
                found = True
        return found

    def preempt(self, seq: Sequence) -> None:
        """Takes a running sequence's place away; it is computed anew when it is admitted again, before all others."""
        self._withdraw(seq)
        self._queue(seq).append_first(seq)
        self.counters.num_preemptions += not seq.request.background

    def _clear_the_way(self) -> bool:
        """The youngest background sequence gives up its place; whether there was one."""
        for seq in reversed(self.running):
            if seq.request.background:
                self.preempt(seq)
                return True
        return False

    def _give_up(self, seq: Sequence, complete: bool) -> None:
        self.released[seq.slot] = complete
        self.slots.release(seq.slot)
        # Last block first: the free list is a queue, and the beginning of a prefix is worth keeping longest.
        for block in reversed(seq.blocks):
            self.pool.release(block)
        seq.slot, seq.num_computed = -1, 0
        seq.forget_launched()
        seq.blocks, seq.keys, seq.contiguous = [], [], True

    def check_integrity(self) -> None:
        """Raises AssertionError if any block or slot is lost, doubled or owned by nobody."""
        owned: dict[int, int] = {}
        for seq in self.running:
            for block in seq.blocks:
                owned[block] = owned.get(block, 0) + 1
        self.pool.check_integrity(owned)
        self.slots.check_integrity({s.slot for s in self.running})
        places = [*self.waiting, *self.background, *self.held.values()]
        for seq in places:
            if seq.running or seq.blocks:
                raise AssertionError(f"{seq.request.request_id} waits but owns a slot or blocks")
        places += self.running
        if len(places) != len(self.by_id) or set(self.by_id.values()) != set(places):
            raise AssertionError("a sequence is neither waiting, running nor held, or more than one of them")
        self.waiting.check_integrity()
        self.background.check_integrity()


def _most_drafts(seq: Sequence) -> int:
    """The bonus token always follows the drafts, so one of the tokens left is not worth drafting."""
    spec = seq.request.speculation
    if not spec.enabled:
        return 0
    left = max(0, seq.num_left - seq.due - 1)
    return left if spec.max_draft_tokens is None else min(left, spec.max_draft_tokens)
