"""The device's side of a verify step, in two halves that are captured as graphs of their own.

    A (rows, k)         block updates -> drafts -> inputs -> forward           leaves `Staged`
    B (rows, k, class)  process + verify -> commit -> drafter -> results       reads it

Between them is where a grammar would upload its masks. All inputs come from one static buffer, all results go to one,
so that a step costs the host one copy each way and two launches.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from draft_models.protocol import DeviceDrafter
from server.engine.gpu.kinds import SamplingClass
from server.engine.gpu.ops import Decision, StepOps
from server.engine.gpu.staging import Download, Upload
from server.engine.gpu.state import DeviceState
from server.kernels.paged import PagedRows
from server.models.paged_forward import PagedForward
from server.sampling.state import SamplingBatch
from server.spec.device import DeviceStep
from server.spec.types import Drafts, Verdict

UPDATES_PER_ROW = 2
"""Blocks a row may get in a verify step before its table is sent apart."""
_PER_ROW = 2 + 3 * UPDATES_PER_ROW
NUM_RESULTS = 3
"""Integers a row besides its tokens: emitted, drafted, broken."""
TOP_LOGPROBS = 20


@dataclass(slots=True)
class Staged:
    """What half A leaves for half B: logits [R * (1 + k), V] and features [R * (1 + k), F]."""

    drafts: Drafts
    logits: Tensor
    features: Tensor | None


@dataclass(frozen=True, slots=True)
class Fields:
    """Where the parts of a step's inputs lie, for R rows and `upload_width` integers a row of the drafter's."""

    num_rows: int
    upload_width: int

    @property
    def slots(self) -> slice:
        return slice(0, self.num_rows)

    @property
    def limits(self) -> slice:
        return slice(self.num_rows, 2 * self.num_rows)

    @property
    def updates(self) -> slice:
        return slice(2 * self.num_rows, _PER_ROW * self.num_rows)

    @property
    def uploads(self) -> slice:
        return slice(_PER_ROW * self.num_rows, self.size)

    @property
    def size(self) -> int:
        return (_PER_ROW + self.upload_width) * self.num_rows


class StepProgram:
    """Runs either half for any (rows, k); what it captures are static buffers and `state`."""

    def __init__(
        self,
        forward: PagedForward,
        drafter: DeviceDrafter | None,
        ops: StepOps,
        state: DeviceState,
        max_rows: int,
        max_drafts: int,
    ) -> None:
        self.forward, self.drafter, self.ops, self.state = forward, drafter, ops, state
        self.feature_layers = drafter.feature_layers if drafter is not None else ()
        self.forced: int | None = None
        device = state.block_tables.device
        widest = max((self.upload_width(k) for k in range(1, max_drafts + 1)), default=0)
        self.inputs = Upload(Fields(max_rows, widest).size, device)
        self.results = Download(
            torch.zeros(max_rows * (1 + max_drafts + NUM_RESULTS), dtype=torch.int64, device=device)
        )
        num_positions = max_rows * (1 + max_drafts)
        self.chosen = Download(torch.zeros(num_positions, dtype=torch.float32, device=device))
        self.top_ids = Download(torch.zeros(num_positions * TOP_LOGPROBS, dtype=torch.int64, device=device))
        self.top_logprobs = Download(torch.zeros(num_positions * TOP_LOGPROBS, dtype=torch.float32, device=device))

    def upload_width(self, k: int) -> int:
        """Integers a row that the drafter's host part sends with a step of `k` drafts."""
        return self.drafter.upload_width(k) if self.drafter is not None and k > 0 else 0

    def fields(self, num_rows: int, k: int) -> Fields:
        return Fields(num_rows, self.upload_width(k))

    def _device_step(self, num_rows: int, k: int, batch: SamplingBatch) -> DeviceStep:
        fields, inputs = self.fields(num_rows, k), self.inputs.device
        width = fields.upload_width
        return DeviceStep(
            slots=inputs[fields.slots],
            limits=inputs[fields.limits],
            state=self.state.slots,
            block_tables=self.state.block_tables,
            temperature=batch.temperature,
            greedy=batch.greedy,
            seeds=batch.seeds,
            choices=batch.choices,
            uploads=inputs[fields.uploads].view(num_rows, width) if width else None,
            max_context=self.state.max_context,
            block_size=self.state.block_size,
        )

    def _batch(self, num_rows: int, k: int, kind: SamplingClass) -> SamplingBatch:
        return self.state.sampling.on_device(
            self.inputs.device[self.fields(num_rows, k).slots],
            sampled=kind > SamplingClass.GREEDY,
            filtered=kind >= SamplingClass.FILTERED,
            full=kind is SamplingClass.FULL,
            num_logprobs=TOP_LOGPROBS,
        )

    def draft_and_forward(self, num_rows: int, k: int) -> Staged:
        """Half A."""
        step = self._device_step(num_rows, k, self._batch(num_rows, k, SamplingClass.SAMPLED))
        fields = self.fields(num_rows, k)
        self.ops.update_tables(self.inputs.device[fields.updates].view(-1, 3), self.state.block_tables)
        if k > 0 and self.drafter is not None:
            drafts = self.drafter.draft(step, k)
        else:
            drafts = Drafts.none(num_rows, step.slots.device)
        inputs = self.ops.gather(step, drafts)
        rows = PagedRows(
            slots=step.slots,
            starts=inputs.starts,
            block_tables=self.state.block_tables,
            block_size=self.state.block_size,
            max_context=self.state.max_context,
            width=1 + k,
        )
        logits, features = self.forward(
            inputs.token_ids, self.state.pools, rows, inputs.positions, inputs.places, None, self.feature_layers
        )
        return Staged(drafts, logits, features)

    def verify(self, num_rows: int, k: int, kind: SamplingClass, staged: Staged) -> tuple[DeviceStep, Decision]:
        """Half B up to the decision: nothing outlives it."""
        batch = self._batch(num_rows, k, kind)
        step = self._device_step(num_rows, k, batch)
        forced = self.forced if k else None
        return step, self.ops.decide(step, staged.logits, staged.drafts, batch, kind, forced)

    def decide(self, num_rows: int, k: int, kind: SamplingClass, staged: Staged) -> None:
        """Half B."""
        step, decision = self.verify(num_rows, k, kind, staged)
        verdict = decision.verdict
        self.ops.commit(step, verdict)
        if self.drafter is not None:
            features = None if staged.features is None else staged.features.view(num_rows, 1 + k, -1)
            self.drafter.after_verify(step, staged.drafts, verdict, features)
        self._report(num_rows, k, verdict, staged.drafts.num_valid, decision.broken)
        if decision.logprobs is not None:
            for source, values in (
                (self.chosen, decision.logprobs.chosen),
                (self.top_ids, decision.logprobs.top_ids),
                (self.top_logprobs, decision.logprobs.top_logprobs),
            ):
                source.source[: values.numel()].copy_(values.reshape(-1))

    def _report(self, num_rows: int, k: int, verdict: Verdict, num_drafted: Tensor, broken: Tensor) -> None:
        width = 1 + k
        report = self.results.source[: num_rows * (width + NUM_RESULTS)].view(num_rows, -1)
        report[:, :width].copy_(verdict.tokens)
        report[:, width].copy_(verdict.num_emitted)
        report[:, width + 1].copy_(num_drafted)
        report[:, width + 2].copy_(broken)
