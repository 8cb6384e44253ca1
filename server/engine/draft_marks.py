"""Marks the blocks that hold the drafter's keys and values too, as steps tell of them. Pure bookkeeping."""

from __future__ import annotations

from server.core import Phase, RowPlan, StepPlan
from server.engine.blocks import BlockPool
from server.engine.draft_kv import MakeSpan
from server.engine.sequence import Sequence


class DraftMarks:
    """Of the blocks in `pool`; without a `make_span` the drafter keeps nothing in them, and nothing is marked."""

    def __init__(self, pool: BlockPool, block_size: int, make_span: MakeSpan | None) -> None:
        self._pool, self._size, self._make_span = pool, block_size, make_span

    def begin(self, seq: Sequence) -> None:
        """All blocks that `seq` has come from a prefix hit: whether the drafter can use them changes no hit."""
        if self._make_span is not None:
            seq.draft_kv = self._make_span([self._pool.is_drafted(block) for block in seq.blocks], self._size)
            seq.num_marked = seq.draft_kv.end // self._size

    def saw(self, seq: Sequence, row: RowPlan, plan: StepPlan, num_emitted: int, chained: bool) -> None:
        """The result of a step of `seq` is known, whose tokens it does not have yet; `chained`: the drafter's network
        ran on its row. A hybrid drafter's need not where it copies: it sees the step and writes nothing.
        """
        if seq.draft_kv is None or not plan.follows:
            return
        if plan.phase is Phase.VERIFY:
            seq.draft_kv.step(seq.num_tokens, num_emitted, chained)
        elif chained:
            seq.draft_kv.chunk(row.start, row.start + row.num_tokens)
        self._mark(seq)

    def ended(self, seq: Sequence, chained: bool) -> None:
        """`seq` has ended, but the step under way may still have a row of it: void for its client, but if it is
        `chained`, the drafter writes what it had not written of the last tokens.
        """
        if seq.draft_kv is not None and seq.due and chained:
            seq.draft_kv.step(seq.num_tokens, 0, True)
            self._mark(seq)

    def _mark(self, seq: Sequence) -> None:
        span = seq.draft_kv
        assert span is not None
        while (end := (seq.num_marked + 1) * self._size) <= span.end:
            if span.holds(end - self._size, end):
                self._pool.mark_drafted(seq.blocks[seq.num_marked])
            elif end == span.end:
                return  # it may once more is known
            seq.num_marked += 1
