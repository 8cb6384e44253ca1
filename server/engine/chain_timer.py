"""What a chain of an EAGLE-3 drafter costs on the CPU, on sequences that are made up."""

from __future__ import annotations

import time

import torch

from draft_models.eagle3_cpu import Eagle3CpuDrafter
from server.core import SamplingParams
from server.engine.step_runner import RunnerShape
from server.sampling.state import SamplingBatch
from server.spec.types import Carry, SlotState

CONTEXT = 128
EMITTED = 2
"""Tokens of the step before, whose keys and values come with the chain."""


class ChainTimer:
    """Called with (rows, drafts a row): milliseconds. For an engine that runs nothing; it leaves its slots free."""

    def __init__(self, drafter: Eagle3CpuDrafter, shape: RunnerShape) -> None:
        self.drafter, self.shape = drafter, shape

    def __call__(self, rows: int, k: int) -> float:
        places = (self.shape.num_blocks - 1) * self.shape.block_size
        context = min(CONTEXT, self.shape.max_model_len - EMITTED, places - k - EMITTED)
        if context < 1:  # a pool this small has no room for drafts
            return 0.0
        sampling = SamplingBatch.of([SamplingParams(temperature=0.0)] * rows, self.drafter.network.config.vocab_size)
        for slot in range(rows):
            self.drafter.admit(slot, [0] * context, context)
        try:
            self._show(rows, 0, context - 1)
            self.drafter.propose(self._carry(rows, context, 1, k), 1, sampling)
            for slot in range(rows):
                self.drafter.observe(slot, [0] * EMITTED)
            self._show(rows, context - 1, EMITTED)
            started = time.perf_counter()
            self.drafter.propose(self._carry(rows, context + EMITTED, 1, k), k, sampling)
            return (time.perf_counter() - started) * 1e3
        finally:
            self.drafter.pause()  # there is nothing worth completing
            for slot in range(rows):
                self.drafter.release(slot)

    def _show(self, rows: int, start: int, length: int) -> None:
        """The drafter sees features of that many tokens."""
        c = self.drafter.network.config
        features = torch.zeros(rows * length, len(c.feature_layers) * c.hidden_size, dtype=self.drafter.network.dtype)
        self.drafter.keep(self._carry(rows, start, length, 0), [length] * rows, features)

    def _carry(self, rows: int, start: int, length: int, k: int) -> Carry:
        """Rows share blocks where the pool is small, which costs the same."""
        shape = self.shape
        per_row = max(1, -(-(start + length + k) // shape.block_size))
        room = max(1, (shape.num_blocks - 1) // per_row)
        firsts = [1 + (r % room) * per_row for r in range(rows)]
        known = torch.full((shape.max_num_seqs,), start, dtype=torch.int64)
        slots = list(range(rows))
        return Carry(
            slots=slots,
            slot_ids=torch.arange(rows),
            state=SlotState(known.new_zeros(shape.max_num_seqs, 1), known, known),
            max_tokens_host=start,
            limits=[k] * rows,
            block_tables=known.new_zeros(rows, 1),
            blocks=[list(range(first, first + per_row)) for first in firsts],
            tokens_host=[start] * rows,
            chunks=[(start, length)] * rows,
        )
