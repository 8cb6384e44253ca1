"""Launches steps on a GPU and never waits for one: what a step needs of the last is on the device.

The host knows upper bounds (`Sequence.most_tokens`), the device the truth. A verify step is one upload, graph A, graph
B and one download; a prompt chunk runs eagerly, and if it ends prompts, their first tokens are decided by the same
graph B (k = 0). Runs on a CPU too, without graphs, which is how its logic is tested there.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import numpy as np
import torch
from torch import Tensor

from draft_models.protocol import DeviceDrafter
from server.core import Phase, StepPlan
from server.engine.gpu.graphs import Graphs
from server.engine.gpu.kinds import SamplingClass, class_of
from server.engine.gpu.launched import DownloadedLogprobs, Launched, PromptScores, StepTimer
from server.engine.gpu.ops import StepOps
from server.engine.gpu.prefill import Chunks, pack
from server.engine.gpu.staging import to_device
from server.engine.gpu.step import NUM_RESULTS, TOP_LOGPROBS, UPDATES_PER_ROW, DeviceState, Staged, StepProgram
from server.engine.gpu.tiers import batch_tiers, tier_of
from server.engine.prompt_logprobs import positions, to_score
from server.engine.runner import RunnerShape
from server.engine.sequence import Sequence
from server.kernels.paged import PagedRows
from server.models.base import TargetModel
from server.models.paged_forward import PagedForward
from server.sampling.state import SamplingState
from server.spec.device import DeviceStep
from server.spec.types import Drafts, SlotState

MAX_BIASES = 304
MAX_ENDS = 16
_TIMERS = 4


@dataclass(frozen=True, slots=True)
class GpuParts:
    """What a GpuRunner is made of besides the network: how it runs, decides and drafts."""

    forward: PagedForward
    ops: StepOps
    drafter: DeviceDrafter | None
    graphs: bool = True
    deterministic: bool = False
    kv_dtype: torch.dtype | None = None


class GpuRunner:
    """Owns the device state of one engine. Not thread-safe; called by the engine loop only."""

    overlaps = True
    ragged = False
    linear_path = "triton+cublas"

    def __init__(self, model: TargetModel, parts: GpuParts, shape: RunnerShape, k_tiers: tuple[int, ...]) -> None:
        self.model, self.drafter, self.shape = model, parts.drafter, shape
        self.device = model.device
        self.tiers, self.k_tiers = batch_tiers(shape.max_num_seqs), (0, *k_tiers)
        self.deterministic = parts.deterministic
        self.pools = make_pools(model, shape, parts.kv_dtype)
        self._forward = parts.forward
        self.state = make_state(self.pools, shape, model.vocab_size, self.device)
        self.sampling = self.state.sampling
        self.program = StepProgram(
            parts.forward, parts.drafter, parts.ops, self.state, self.tiers[-1], shape.max_draft_tokens
        )
        self.graphs = Graphs(self.device, parts.graphs)
        self._tables = self.sampling.tables()
        self._staged: dict[tuple[int, int], Staged] = {}
        self._kinds = [SamplingClass.GREEDY] * shape.max_num_seqs
        self._timers = [StepTimer(self.device) for _ in range(_TIMERS)]
        self._num_launched = 0
        self._drafting = False
        bind = getattr(parts.drafter, "bind", None)
        if bind is not None:
            bind(self.state.block_tables)

    # -- host events ---------------------------------------------------------------------------------------

    def admit(self, seq: Sequence) -> None:
        """Fills the slot that the scheduler gave to `seq`."""
        slot, request = seq.slot, seq.request
        slots = self.state.slots
        slots.history[slot, : seq.num_tokens].copy_(to_device(seq.token_ids, self.device))
        slots.num_tokens[slot].fill_(seq.num_tokens)
        slots.prompt_len[slot].fill_(seq.prompt_len)
        early = seq.num_emitted < request.min_tokens and bool(seq.ends)
        self._kinds[slot] = class_of(request.sampling, early)
        self.sampling.set(slot, request.sampling, request.choice, request.min_tokens, seq.ends if early else ())
        if self.drafter is not None:
            prediction = request.prediction_ids[: self.shape.max_model_len]
            self.drafter.admit(slot, seq.token_ids, seq.prompt_len, prediction)

    def scrub(self, blocks: list[int]) -> None:
        """Zeroes blocks: masked attention multiplies stale places by zero, which does not rid it of a NaN.

        Block 0 too: tokens that nobody keeps are written there.
        """
        size = self.shape.block_size
        for pool in [*self.pools, *getattr(self.drafter, "pools", [])]:
            for block in (0, *blocks):
                pool[block * size : (block + 1) * size].zero_()

    def release(self, slot: int, complete: bool = False) -> None:
        """The slot is free; a step that still runs may write to it, and whoever takes it next comes after that."""
        self.sampling.clear(slot)
        if self.drafter is not None:
            self.drafter.release(slot, complete)

    @property
    def num_graph_misses(self) -> int:
        """See StepRunner."""
        return self.graphs.stats.num_misses

    # -- start-up ------------------------------------------------------------------------------------------

    @property
    def forced_accepted(self) -> int | None:
        """Benchmarks only: how many drafts of each row count as accepted, whatever the target says."""
        return self.program.forced

    @forced_accepted.setter
    def forced_accepted(self, value: int | None) -> None:
        self.program.forced = value
        if self.graphs.stats.num_graphs:
            self.capture()

    def capture(self, kinds: tuple[SamplingClass, ...] = tuple(SamplingClass)) -> None:
        """Captures every graph that a step can need, largest first; nothing runs on a real slot."""
        self.graphs.clear()
        self._staged.clear()
        for num_rows in reversed(self.tiers):
            for k in reversed(self.k_tiers):
                self._capture_pair(num_rows, k, kinds)

    def warm_up_jobs(self) -> list[Callable[[], object]]:
        """Launches of every kernel of a step but the drafter's own, on nothing: to be compiled side by side."""
        return [partial(self._warm_up, num_rows, k) for num_rows in self.tiers for k in self.k_tiers]

    def _warm_up(self, num_rows: int, k: int) -> None:
        self._idle_inputs(num_rows, k)
        zeros = torch.zeros(num_rows * (1 + k), dtype=torch.int64, device=self.device)
        slots = torch.full((num_rows,), self.shape.max_num_seqs, dtype=torch.int64, device=self.device)
        rows = PagedRows(
            slots=slots,
            starts=torch.zeros_like(slots),
            block_tables=self.state.block_tables,
            block_size=self.shape.block_size,
            max_context=self.state.max_context,
            width=1 + k,
        )
        logits, _ = self._forward(zeros, self.pools, rows, zeros, zeros, None, self.program.feature_layers)
        drafts = Drafts(torch.zeros(num_rows, k, dtype=torch.int64, device=self.device), torch.zeros_like(slots))
        staged = Staged(drafts, logits, None)
        for kind in (SamplingClass.GREEDY, SamplingClass.SAMPLED, SamplingClass.FILTERED):
            self.program.verify(num_rows, k, kind, staged)

    def _capture_pair(self, num_rows: int, k: int, kinds: tuple[SamplingClass, ...]) -> None:
        self._idle_inputs(num_rows, k)
        self.graphs.capture(("forward", num_rows, k), partial(self._run_forward, num_rows, k))
        if (num_rows, k) not in self._staged:
            self._run_forward(num_rows, k)
        for kind in kinds:
            decide = partial(self._run_verify, num_rows, k, kind)
            self.graphs.capture(("verify", num_rows, k, kind.name), decide)
        if k > 0 and self.graphs.enabled:
            del self._staged[num_rows, k]  # its memory serves the next pair; k = 0 also decides what prompts emit

    def _idle_inputs(self, num_rows: int, k: int) -> None:
        fields = self.program.fields(num_rows, k)
        buffer = self.program.inputs.begin()
        buffer[: fields.size] = 0
        buffer[fields.slots] = self.shape.max_num_seqs
        buffer[fields.updates][::3] = self.shape.max_num_seqs
        self.program.inputs.send(fields.size)

    def time_step(self, num_rows: int, k: int, context: int, repeats: int = 3) -> float:
        """Milliseconds of a greedy step of `num_rows` rows with `k` drafts that see `context` tokens, drafting
        included.

        For start-up, before any request: it uses the first slots and whatever blocks, and leaves the slots unused.
        """
        slots, tables, size = self.state.slots, self.state.block_tables, self.shape.block_size
        per_row = -(-(context + (repeats + 1) * (1 + k)) // size)
        blocks = torch.arange(num_rows * per_row, device=self.device) % (self.shape.num_blocks - 1) + 1
        width = min(per_row, tables.shape[1])
        tables[:num_rows, :width] = blocks.view(num_rows, per_row)[:, :width].to(tables.dtype)
        slots.num_tokens[:num_rows] = context
        rows, timer = tier_of(self.tiers, num_rows), StepTimer(self.device)
        taken = []
        for attempt in range(1 + repeats):
            self._send(rows, k, list(range(num_rows)), [k] * num_rows, [])
            timer.start()
            started = time.perf_counter()
            self.graphs.run(("forward", rows, k), partial(self._run_forward, rows, k))
            greedy = SamplingClass.GREEDY
            self.graphs.run(("verify", rows, k, greedy.name), partial(self._run_verify, rows, k, greedy))
            timer.end()
            elapsed = timer.wait() or (time.perf_counter() - started) * 1e3
            if attempt:
                taken.append(elapsed)
        slots.num_tokens[:num_rows] = 1
        tables[:num_rows] = 0
        return statistics.median(taken)

    # -- a step --------------------------------------------------------------------------------------------

    def launch(self, plan: StepPlan, sequences: list[Sequence]) -> Launched:
        """Starts `plan`, whose rows belong to `sequences`."""
        self._end_freely(sequences)
        timer = self._timers[self._num_launched % _TIMERS]
        self._num_launched += 1
        timer.start()
        if plan.phase is Phase.PREFILL:
            launched = self._prefill(plan, sequences, timer)
        else:
            launched = self._verify(plan, sequences, timer)
        timer.end()
        return launched

    def _end_freely(self, sequences: list[Sequence]) -> None:
        for seq in sequences if self.sampling.early_slots else ():
            if seq.slot in self.sampling.early_slots and seq.num_emitted >= seq.request.min_tokens:
                self.sampling.end_freely(seq.slot)
                self._kinds[seq.slot] = class_of(seq.request.sampling, early=False)

    def _verify(self, plan: StepPlan, sequences: list[Sequence], timer: StepTimer) -> Launched:
        limits = [row.max_drafts for row in plan.rows]
        k = plan.num_draft_tokens if self.drafter is not None and any(limits) else 0
        num_rows = tier_of(self.tiers, len(sequences))
        self._begin_drafting(k, sequences)
        slots = [seq.slot for seq in sequences]
        self._send(num_rows, k, slots, limits, self._table_updates(sequences, num_rows))
        self.graphs.run(("forward", num_rows, k), partial(self._run_forward, num_rows, k))
        return self._decide(num_rows, k, sequences, list(range(len(slots))), timer, len(slots) * (1 + k))

    def _begin_drafting(self, k: int, sequences: list[Sequence]) -> None:
        if self.drafter is None:
            return
        if self._drafting and k == 0:
            self.drafter.pause()
        elif k > 0 and not self._drafting:
            self.drafter.resume([seq.slot for seq in sequences], [seq.token_ids for seq in sequences])
        self._drafting = k > 0

    def _send(self, num_rows: int, k: int, slots: list[int], limits: list[int], updates: list[int]) -> None:
        fields = self.program.fields(num_rows, k)
        buffer = self.program.inputs.begin()
        nobody, padding = self.shape.max_num_seqs, num_rows - len(slots)
        buffer[fields.slots] = slots + [nobody] * padding
        buffer[fields.limits] = limits + [0] * padding
        room = buffer[fields.updates]
        room[: len(updates)] = updates
        room[len(updates) :] = 0
        room[len(updates) :: 3] = nobody
        if fields.upload_width:
            assert self.drafter is not None
            sent = buffer[fields.uploads].reshape(num_rows, fields.upload_width)
            sent[: len(slots)] = self.drafter.upload(slots, limits, k)
            sent[len(slots) :] = 0
        self.program.inputs.send(fields.size)

    def _table_updates(self, sequences: list[Sequence], num_rows: int) -> list[int]:
        """(slot, index, block) of the blocks that rows have got; what is too much for the step's inputs goes apart."""
        updates: list[int] = []
        for seq in sequences:
            blocks = seq.blocks
            for index in range(seq.num_synced, len(blocks)):  # entries behind the last are stale: nobody reads them
                updates += (seq.slot, index, blocks[index])
            seq.num_synced = len(blocks)
        room = 3 * UPDATES_PER_ROW * num_rows
        if len(updates) > room:
            self.program.ops.update_tables(to_device(updates, self.device).view(-1, 3), self.state.block_tables)
            return []
        return updates

    def _run_forward(self, num_rows: int, k: int) -> None:
        self._staged[num_rows, k] = self.program.draft_and_forward(num_rows, k)

    def _run_verify(self, num_rows: int, k: int, kind: SamplingClass) -> None:
        self.program.decide(num_rows, k, kind, self._staged[num_rows, k])

    def _decide(
        self, num_rows: int, k: int, sequences: list[Sequence], emitting: list[int], timer: StepTimer, num_run: int
    ) -> Launched:
        """Half B for the rows `emitting` of the step, and its results on their way."""
        program = self.program
        kind = max(self._kinds[sequences[row].slot] for row in emitting)
        self._check_tables()
        self.graphs.run(("verify", num_rows, k, kind.name), partial(self._run_verify, num_rows, k, kind))
        report = program.results.fetch(num_rows * (1 + k + NUM_RESULTS))
        logprobs = None
        if any(sequences[row].request.sampling.logprobs is not None for row in emitting):
            count = num_rows * (1 + k)
            logprobs = DownloadedLogprobs(
                program.chosen.fetch(count),
                program.top_ids.fetch(count * TOP_LOGPROBS),
                program.top_logprobs.fetch(count * TOP_LOGPROBS),
            )
        return Launched(timer, sequences, num_run, emitting, report, 1 + k, logprobs)

    def _check_tables(self) -> None:
        """A request with more biases or ends than there was room for has moved the tables that graphs read."""
        tables = self.sampling.tables()
        if any(a is not b for a, b in zip(tables, self._tables, strict=True)):
            self._tables = tables
            self.capture()

    # -- prompt chunks -------------------------------------------------------------------------------------

    def _prefill(self, plan: StepPlan, sequences: list[Sequence], timer: StepTimer) -> Launched:
        updates = self._table_updates(sequences, 0)
        assert not updates
        chunks = pack(plan, sequences, self.state.block_tables, self.shape.block_size, self.device)
        sampling = [i for i, row in enumerate(plan.rows) if row.samples]
        scored = to_score(plan.rows, sequences)
        at = chunks.ends[sampling]
        if scored:
            at = np.concatenate([at, positions(scored, plan.rows, torch.from_numpy(chunks.ends)).numpy()])
        logits, features = self._forward(
            chunks.token_ids,
            self.pools,
            chunks.rows,
            chunks.positions,
            chunks.places,
            to_device(at, self.device),
            self.program.feature_layers,
        )
        if self.drafter is not None and plan.num_draft_tokens > 0:
            self.drafter.prefill_chunk(self._prefill_step(chunks.rows), chunks.token_ids, chunks.rows, features)
        scores = PromptScores(scored, logits[len(sampling) :]) if scored else None
        num_run = len(chunks.token_ids)
        if not sampling:
            return Launched(timer, sequences, num_run, [], None, 1, scores=scores)
        launched = self._decide_prompts(sequences, sampling, logits, features, chunks, timer)
        launched.scores = scores
        return launched

    def _decide_prompts(
        self,
        sequences: list[Sequence],
        sampling: list[int],
        logits: Tensor,
        features: Tensor | None,
        chunks: Chunks,
        timer: StepTimer,
    ) -> Launched:
        """The first tokens of prompts that end: half B of a step without drafts, on these logits."""
        num_rows, count = tier_of(self.tiers, len(sampling)), len(sampling)
        self._send(num_rows, 0, [sequences[row].slot for row in sampling], [0] * count, [])
        staged = self._staged.get((num_rows, 0))
        if staged is None:  # without graphs: room for what half A would have left
            wide = None if features is None else features.new_zeros(num_rows, features.shape[1])
            drafts = Drafts.none(num_rows, self.device)
            staged = self._staged[num_rows, 0] = Staged(drafts, logits.new_zeros(num_rows, logits.shape[1]), wide)
        staged.logits[:count].copy_(logits[:count])
        if features is not None and staged.features is not None:
            staged.features[:count].copy_(features[to_device(chunks.ends[sampling], self.device)])
        return self._decide(num_rows, 0, sequences, sampling, timer, len(chunks.token_ids))

    def _prefill_step(self, rows: PagedRows) -> DeviceStep:
        batch = self.sampling.on_device(rows.slots, sampled=True, filtered=False, full=False)
        return DeviceStep(
            slots=rows.slots,
            limits=torch.zeros_like(rows.slots),
            state=self.state.slots,
            block_tables=self.state.block_tables,
            temperature=batch.temperature,
            greedy=batch.greedy,
            seeds=batch.seeds,
            choices=batch.choices,
            uploads=None,
            max_context=self.state.max_context,
            block_size=self.state.block_size,
        )


def make_pools(model: TargetModel, shape: RunnerShape, dtype: torch.dtype | None = None) -> list[Tensor]:
    """The KV pool, a tensor a layer: [num_blocks * block_size, 2 * kv_heads, head_dim], zeroed.

    Layers of one shape are views of one tensor, one layer after another. `dtype` None means the network's.
    """
    places = shape.num_blocks * shape.block_size
    kind, device = dtype or model.dtype, model.device
    first = model.kv_layers[0]
    if all(kv == first for kv in model.kv_layers):
        whole = torch.zeros(
            len(model.kv_layers), places, 2 * first.num_kv_heads, first.head_dim, dtype=kind, device=device
        )
        return list(whole.unbind(0))
    return [torch.zeros(places, 2 * kv.num_kv_heads, kv.head_dim, dtype=kind, device=device) for kv in model.kv_layers]


def make_state(pools: list[Tensor], shape: RunnerShape, vocab_size: int, device: torch.device) -> DeviceState:
    """Per-slot tensors, with one slot more than there are sequences: padding rows name it.

    A sequence that has ended on the host may run one step more, so there is room for two steps' tokens.
    """
    slots, length = shape.max_num_seqs + 1, shape.max_model_len + 2 * (shape.max_draft_tokens + 1) + 2
    state = SlotState(
        history=torch.zeros(slots, length, dtype=torch.int64, device=device),
        num_tokens=torch.ones(slots, dtype=torch.int64, device=device),
        prompt_len=torch.ones(slots, dtype=torch.int64, device=device),
    )
    table_len = -(-length // shape.block_size) + 1
    tables = torch.zeros(slots, table_len, dtype=torch.int32, device=device)
    sampling = SamplingState(slots, vocab_size, device)
    sampling.reserve(MAX_BIASES, MAX_ENDS)
    return DeviceState(state, tables, sampling, pools, shape.block_size, length)
