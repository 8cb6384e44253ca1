"""The device's side of a verify step, in two halves that are captured as graphs of their own.

    A (rows, k)         block updates -> drafts -> inputs -> forward           leaves `Staged`
    B (rows, k, class)  process + verify -> commit -> drafter -> results       reads it

Without drafts the drafter has no part in either, and the network leaves no features. Where it is to see such a step all
the same, A is another, which leaves them, and `follow` is a third part behind B.

Between them is where a grammar would upload its masks. All inputs come from one static buffer, all results go to one,
so that a step costs the host one copy each way and two launches.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from draft_models.protocol import DeviceDrafter
from server.engine.gpu.kinds import SamplingClass
from server.engine.gpu.ops import NUM_REPORTED, StepOps
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
TOP_LOGPROBS = 20


@dataclass(slots=True)
class Staged:
    """What half A leaves for half B: logits [R * (1 + k), V] and features [R * (1 + k), F].

    `complete` False: the drafter has no part in it (kernels are warmed up).
    """

    drafts: Drafts
    logits: Tensor
    features: Tensor | None
    complete: bool = True

    def overwrite(self, other: Staged) -> None:
        """Takes the values of `other`, whose drafts are point masses: half B was captured on these tensors."""
        mine, theirs = self.drafts, other.drafts
        pairs = [(self.logits, other.logits), (mine.tokens, theirs.tokens), (mine.num_valid, theirs.num_valid)]
        for kept, new in [*pairs, (self.features, other.features), (mine.origins, theirs.origins)]:
            if kept is not None and new is not None:
                kept.copy_(new)
        if mine.probs is not None:
            mine.probs.zero_().scatter_(2, theirs.tokens[:, :, None], 1.0)


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
        self._no_drafts: dict[int, Drafts] = {}
        self._no_verdicts: dict[int, Verdict] = {}
        device = state.block_tables.device
        widest = max((self.upload_width(k) for k in range(1, max_drafts + 1)), default=0)
        self.inputs = Upload(Fields(max_rows, widest).size, device)
        self.results = Download(
            torch.zeros(max_rows * (2 + max_drafts + NUM_REPORTED), dtype=torch.int64, device=device)
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

    def _device_step(self, num_rows: int, k: int) -> DeviceStep:
        fields, inputs = self.fields(num_rows, k), self.inputs.device
        width = fields.upload_width
        uploads = inputs[fields.uploads].view(num_rows, width) if width else None
        return self.state.step(inputs[fields.slots], inputs[fields.limits], uploads)

    def _batch(self, step: DeviceStep, kind: SamplingClass) -> SamplingBatch | None:
        if not self.ops.wants_batch:
            return None
        return self.state.sampling.on_device(
            step.slots,
            sampled=kind > SamplingClass.GREEDY,
            filtered=kind >= SamplingClass.FILTERED,
            full=kind >= SamplingClass.ADJUSTED,
            num_logprobs=TOP_LOGPROBS,
        )

    def no_drafts(self, num_rows: int) -> Drafts:
        """What a step without drafts has of them.

        Made once and never inside a graph, whose memory other graphs write to: prompts' first tokens are decided by
        half B alone.
        """
        found = self._no_drafts.get(num_rows)
        if found is None:
            found = self._no_drafts[num_rows] = Drafts.none(num_rows, self.inputs.device.device)
        return found

    def _plain_verdict(self, num_rows: int) -> Verdict:
        """What is known of any step without drafts: every row emitted one token (which one is left out). Made once."""
        found = self._no_verdicts.get(num_rows)
        if found is None:
            ones = torch.ones(num_rows, dtype=torch.int64, device=self.inputs.device.device)
            zeros = torch.zeros_like(ones)
            found = self._no_verdicts[num_rows] = Verdict(zeros.view(num_rows, 1), zeros, ones)
        return found

    def draft_and_forward(self, num_rows: int, k: int, chain: bool = True, follows: bool = False) -> Staged:
        """Half A; without `chain` a hybrid drafter only copies. `follows`: without drafts it leaves features too."""
        step = self._device_step(num_rows, k)
        fields = self.fields(num_rows, k)
        self.ops.update_tables(self.inputs.device[fields.updates].view(-1, 3), self.state.block_tables)
        drafts = self._draft(step, k, chain)
        inputs = self.ops.gather(step, drafts)
        rows = PagedRows(
            slots=step.slots,
            starts=inputs.starts,
            block_tables=self.state.block_tables,
            block_size=self.state.block_size,
            max_context=self.state.max_context,
            width=1 + k,
        )
        layers = self.feature_layers if k > 0 or follows else ()
        logits, features = self.forward(
            inputs.token_ids, self.state.pools, rows, inputs.positions, inputs.places, None, layers
        )
        return Staged(drafts, logits, features)

    def _draft(self, step: DeviceStep, k: int, chain: bool) -> Drafts:
        if self.drafter is None or k == 0:
            return self.no_drafts(step.num_rows)
        if chain:
            return self.drafter.draft(step, k)
        drafts: Drafts = self.drafter.draft_copies(step, k)  # type: ignore[attr-defined]
        return drafts

    @property
    def can_copy(self) -> bool:
        """Whether the drafter can draft without its network."""
        return hasattr(self.drafter, "draft_copies")

    def verify(self, num_rows: int, k: int, kind: SamplingClass, staged: Staged) -> None:
        """Half B."""
        step = self._device_step(num_rows, k)
        report = self.results.source[: num_rows * (1 + k + NUM_REPORTED)]
        verdict, logprobs = self.ops.finish(
            step, staged.logits, staged.drafts, self._batch(step, kind), kind, self.forced if k else None, report
        )
        origins = staged.drafts.origins
        if origins is not None:
            self.results.source[report.numel() :][:num_rows].copy_(origins)
        if self.drafter is not None and k > 0 and staged.complete:
            features = None if staged.features is None else staged.features.view(num_rows, 1 + k, -1)
            self.drafter.after_verify(step, staged.drafts, verdict, features)
        if logprobs is not None:
            for source, values in (
                (self.chosen, logprobs.chosen),
                (self.top_ids, logprobs.top_ids),
                (self.top_logprobs, logprobs.top_logprobs),
            ):
                source.source[: values.numel()].copy_(values.reshape(-1))

    def follow(self, num_rows: int, staged: Staged) -> None:
        """Behind half B without drafts: shows the drafter what the network made of each row's last token."""
        assert self.drafter is not None and staged.features is not None
        step, features = self._device_step(num_rows, 0), staged.features.view(num_rows, 1, -1)
        self.drafter.after_verify(step, staged.drafts, self._plain_verdict(num_rows), features)
