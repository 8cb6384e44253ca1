"""What a step does besides the network: gather its inputs, decide, commit. In torch operations here: the reference,
which also runs on a CPU. `kernel_ops` does the same with kernels."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from server.engine.gpu.kinds import SamplingClass
from server.sampling.logprobs import Logprobs, emitted_logprobs
from server.sampling.process import process
from server.sampling.rows import spread
from server.sampling.state import SamplingBatch
from server.spec.device import DeviceStep
from server.spec.types import Drafts, Layout, Verdict
from server.spec.verify import verify


@dataclass(slots=True)
class Inputs:
    """The N = R * (1 + k) tokens of a step: `token_ids`, their `positions` and `places` in the pool, [N] int64.

    `starts` [R] int64 is the position of each row's first token.
    """

    token_ids: Tensor
    starts: Tensor
    positions: Tensor
    places: Tensor


NUM_REPORTED = 3
"""Integers of a row's report besides its tokens: emitted, drafted, broken."""


class StepOps(Protocol):
    """Nothing here waits for the device or depends on a value that is there."""

    wants_batch: bool
    """Whether `finish` needs the rows' parameters gathered, or reads them by slot."""

    def update_tables(self, updates: Tensor, block_tables: Tensor) -> None:
        """`updates` [U, 3] int64 are (slot, index, block); unused ones name the last slot, index 0 and block 0."""

    def gather(self, step: DeviceStep, drafts: Drafts) -> Inputs:
        """Each row's last committed token and its drafts. A draft beyond the row's limit has its place in block 0."""

    def finish(
        self,
        step: DeviceStep,
        logits: Tensor,
        drafts: Drafts,
        batch: SamplingBatch | None,
        kind: SamplingClass,
        forced: int | None,
        report: Tensor,
    ) -> tuple[Verdict, Logprobs | None]:
        """Verifies `logits` [R * (1 + k), V], appends what was emitted to every slot but the last, and reports it.

        A row of `report` [R * (1 + k + NUM_REPORTED)] int64 is its tokens and how many were emitted, how many drafted,
        and whether an emitted position has logits that are not finite. `batch` is there where the operations want it.
        FULL steps report log-probabilities. `forced` (benchmarks only): how many drafts count as accepted.
        """


class TorchOps:
    """Implements StepOps."""

    wants_batch = True

    def __init__(self, rule: str) -> None:
        self.rule = rule
        self._layouts: dict[tuple[int, int], Layout] = {}

    def update_tables(self, updates: Tensor, block_tables: Tensor) -> None:
        """See StepOps."""
        slot, index, block = updates.unbind(1)
        block_tables[slot, index] = block.to(block_tables.dtype)

    def gather(self, step: DeviceStep, drafts: Drafts) -> Inputs:
        """See StepOps."""
        starts = step.state.num_tokens.index_select(0, step.slots) - 1
        last = step.state.history[step.slots, starts]
        token_ids = torch.cat([last.unsqueeze(1), drafts.tokens], dim=1)
        offsets = torch.arange(token_ids.shape[1], device=starts.device)
        positions = starts.unsqueeze(1) + offsets
        block = step.block_tables[step.slots].gather(1, positions // step.block_size)
        places = block.long() * step.block_size + positions % step.block_size
        places = torch.where(offsets <= step.limits.unsqueeze(1), places, 0)
        return Inputs(token_ids.view(-1), starts, positions.view(-1), places.view(-1))

    def layout(self, num_rows: int, width: int, device: torch.device) -> Layout:
        """Rows of equal width. Made once a shape: a captured graph keeps reading it."""
        found = self._layouts.get((num_rows, width))
        if found is None:
            rows = torch.arange(num_rows, device=device).repeat_interleave(width)
            offsets = torch.arange(width, device=device).repeat(num_rows)
            found = self._layouts[num_rows, width] = Layout(rows, offsets, num_rows, width)
        return found

    def finish(
        self,
        step: DeviceStep,
        logits: Tensor,
        drafts: Drafts,
        batch: SamplingBatch | None,
        kind: SamplingClass,
        forced: int | None,
        report: Tensor,
    ) -> tuple[Verdict, Logprobs | None]:
        """See StepOps."""
        assert batch is not None
        logits = logits.float()
        width = 1 + drafts.tokens.shape[1]
        layout = self.layout(step.num_rows, width, logits.device)
        processed = process(logits, layout, drafts, batch, step.state, step.slots, step.max_context)
        known = step.state.num_tokens.index_select(0, step.slots)
        verdict = verify(processed, layout, drafts, batch, known, self.rule)
        if forced is not None:
            accepted = drafts.num_valid.clamp(max=forced)
            verdict = Verdict(verdict.tokens, accepted, accepted + 1)
        logprobs = None
        if kind is SamplingClass.FULL and batch.max_logprobs is not None:
            logprobs = emitted_logprobs(logits, layout, verdict, batch.max_logprobs)
        emitting = torch.arange(width, device=logits.device) < verdict.num_emitted.unsqueeze(1)
        broken = (spread(~logits.amax(-1).isfinite(), layout) & emitting).any(1)
        self._commit(step, verdict)
        lines = report.view(step.num_rows, -1)
        lines[:, :width].copy_(verdict.tokens)
        for column, values in enumerate((verdict.num_emitted, drafts.num_valid, broken)):
            lines[:, width + column].copy_(values)
        return verdict, logprobs

    def _commit(self, step: DeviceStep, verdict: Verdict) -> None:
        state = step.state
        known = state.num_tokens.index_select(0, step.slots)
        at = known.unsqueeze(1) + torch.arange(verdict.tokens.shape[1], device=known.device)
        state.history[step.slots.unsqueeze(1), at] = verdict.tokens
        counts = torch.where(step.slots < state.num_tokens.shape[0] - 1, verdict.num_emitted, 0)
        state.num_tokens.index_add_(0, step.slots, counts)
