"""Launches steps on a GPU and never waits for one: what a step needs of the last is on the device.

The host knows upper bounds (`Sequence.most_tokens`), the device the truth. A verify step is one upload, graph A, graph
B and one download. A prompt chunk is one upload and a graph of its own, or runs eagerly where that costs nothing
(prompt_graphs); if it ends prompts, their first tokens are decided by the same graph B (k = 0).

Runs on a CPU too, without graphs, which is how its logic is tested there.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from draft_models.protocol import DeviceDrafter
from server.core import Phase, StepPlan
from server.engine.gpu.admission import Admission
from server.engine.gpu.executor import Executor
from server.engine.gpu.kinds import SamplingClass, class_of
from server.engine.gpu.launched import DownloadedLogprobs, Launched, PromptScores, StepTimer
from server.engine.gpu.ops import NUM_REPORTED, StepOps
from server.engine.gpu.prefill import Chunks
from server.engine.gpu.state import make_state
from server.engine.gpu.step import TOP_LOGPROBS, UPDATES_PER_ROW, StepProgram
from server.engine.gpu.tiers import tier_of
from server.engine.prompt_logprobs import positions, to_score
from server.engine.sequence import Sequence
from server.engine.step_runner import RunnerShape
from server.models.base import TargetModel
from server.models.paged_forward import PagedForward
from server.models.paging import make_pools
from server.spec.upload import to_device

_TIMERS = 4


@dataclass(frozen=True, slots=True)
class GpuParts:
    """What a GpuRunner is made of besides the network: how it runs, decides and drafts.

    `prompt_tokens`: the most tokens of a prefill step, where small prompt chunks may run from graphs; else 0.
    """

    forward: PagedForward
    ops: StepOps
    drafter: DeviceDrafter | None
    graphs: bool = True
    deterministic: bool = False
    kv_dtype: torch.dtype | None = None
    linear_path: str = "torch"
    prompt_tokens: int = 0


class GpuRunner:
    """Owns the device state of one engine. Not thread-safe; called by the engine loop only."""

    overlaps = True
    ragged = False

    def __init__(self, model: TargetModel, parts: GpuParts, shape: RunnerShape, k_tiers: tuple[int, ...]) -> None:
        self.model, self.drafter, self.shape = model, parts.drafter, shape
        self.device, self.deterministic = model.device, parts.deterministic
        self.linear_path = parts.linear_path
        places = shape.num_blocks * shape.block_size
        self.pools = make_pools(model.kv_layers, places, parts.kv_dtype or model.dtype, self.device)
        self.state = make_state(self.pools, shape, model.vocab_size, self.device)
        self.sampling = self.state.sampling
        self.program = StepProgram(
            parts.forward, parts.drafter, parts.ops, self.state, shape.max_num_seqs, shape.max_draft_tokens
        )
        self.executor = Executor(self.program, shape.max_num_seqs, k_tiers, parts.graphs, parts.prompt_tokens)
        self._admission = Admission(self.state)
        self._kinds = [SamplingClass.GREEDY] * shape.max_num_seqs
        self._timers = [StepTimer(self.device) for _ in range(_TIMERS)]
        self._num_launched = 0
        self._drafting = False
        self._copied = False  # whether the last verify step had drafts and no chain
        self._behind: dict[int, int] = {}  # slots whose drafter has not seen every token: how many it has seen
        self._origin_of = getattr(parts.drafter, "origin_of", None)
        bind = getattr(parts.drafter, "bind", None)
        if bind is not None:
            bind(self.state.block_tables)

    # -- host events ---------------------------------------------------------------------------------------

    def admit(self, sequences: list[Sequence]) -> None:
        """Fills the slots that the scheduler gave to `sequences`."""
        for seq in sequences:
            self._kinds[seq.slot] = class_of(seq.request.sampling, seq.early)
            self._behind.pop(seq.slot, None)
        for slots, num_tokens, cached in self._admission.fill(sequences):
            if self.drafter is not None:
                self.drafter.admit_slots(slots, num_tokens, cached)
        if self.drafter is None:
            return
        for seq in sequences:
            if seq.draft_kv is not None and seq.draft_kv.end < seq.num_computed and not self.program.feature_layers:
                self._behind[seq.slot] = seq.draft_kv.end
            prediction = seq.request.prediction_ids[: self.shape.max_model_len]
            self.drafter.admit(seq.slot, seq.token_ids, seq.prompt_len, prediction)

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
        return self.executor.graphs.stats.num_misses

    @property
    def forced_accepted(self) -> int | None:
        """Benchmarks only: how many drafts of each row count as accepted, whatever the target says."""
        return self.program.forced

    @forced_accepted.setter
    def forced_accepted(self, value: int | None) -> None:
        self.program.forced = value
        if self.executor.graphs.stats.num_graphs:
            self.executor.capture()

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
            if seq.slot in self.sampling.early_slots and not seq.early:
                self.sampling.end_freely(seq.slot)
                self._kinds[seq.slot] = class_of(seq.request.sampling, early=False)

    def _verify(self, plan: StepPlan, sequences: list[Sequence], timer: StepTimer) -> Launched:
        limits = [row.max_drafts for row in plan.rows]
        k = plan.num_draft_tokens if self.drafter is not None and any(limits) else 0
        num_rows = tier_of(self.executor.tiers, len(sequences))
        chain = self._chain_runs
        caught_up = self._begin_drafting(k if chain else 0, plan.follows and (chain or k == 0), sequences)
        self._copied = k > 0 and not chain
        followed = k == 0 and plan.follows and bool(self.program.feature_layers)
        slots = [seq.slot for seq in sequences]
        self.executor.send(num_rows, k, slots, limits, self._table_updates(sequences, num_rows))
        self.executor.forward(num_rows, k, chain, followed)
        launched = self._decide(num_rows, k, sequences, list(range(len(slots))), timer, len(slots) * (1 + k))
        launched.chain_tokens, launched.chained = k if chain else 0, chain and k > 0
        launched.caught_up, launched.followed = caught_up, followed
        if followed:
            self.executor.follow(num_rows)
        return launched

    @property
    def _chain_runs(self) -> bool:
        """Whether drafting runs the drafter's network; a hybrid drafter may do without."""
        return bool(getattr(self.drafter, "chain", True))

    def _begin_drafting(self, k: int, follows: bool, sequences: list[Sequence]) -> bool:
        """Before a verify step: rows that steps without drafts have left behind catch up, if it drafts; whether any
        had to.

        Not those of a drafter that reads features, which nobody computes again: it knows itself which it has seen.
        """
        if self.drafter is None:
            return False
        if k == 0:
            if self._drafting and not follows:
                self.drafter.pause()
            self._drafting = self._drafting and follows
            if not self.program.feature_layers:
                for seq in sequences:
                    self._behind.setdefault(seq.slot, seq.num_tokens)
            return False
        self._drafting = True
        late = [seq for seq in sequences if seq.slot in self._behind] if self._behind else []
        if late:
            seen = [self._behind.pop(seq.slot) for seq in late]
            self.drafter.resume([seq.slot for seq in late], [seq.token_ids for seq in late], seen)
            if self._copied:  # that step may still run, and its tokens be too many for the chain: they come next time
                self._behind |= {seq.slot: seq.num_tokens for seq in late}
        return bool(late) and late[0].draft_kv is not None

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

    def _decide(
        self, num_rows: int, k: int, sequences: list[Sequence], emitting: list[int], timer: StepTimer, num_run: int
    ) -> Launched:
        """Half B for the rows `emitting` of the step, and its results on their way."""
        program = self.program
        kind = max(self._kinds[sequences[row].slot] for row in emitting)
        self.executor.verify(num_rows, k, kind)
        origin_of = self._origin_of if k else None
        report = program.results.fetch(num_rows * (1 + k + NUM_REPORTED + (origin_of is not None)))
        logprobs = None
        if any(sequences[row].request.sampling.logprobs is not None for row in emitting):
            count = num_rows * (1 + k)
            logprobs = DownloadedLogprobs(
                program.chosen.fetch(count),
                program.top_ids.fetch(count * TOP_LOGPROBS),
                program.top_logprobs.fetch(count * TOP_LOGPROBS),
            )
        return Launched(timer, sequences, num_run, emitting, report, 1 + k, logprobs, origin_of=origin_of)

    # -- prompt chunks -------------------------------------------------------------------------------------

    def _prefill(self, plan: StepPlan, sequences: list[Sequence], timer: StepTimer) -> Launched:
        updates = self._table_updates(sequences, 0)
        assert not updates
        chunks = Chunks.of(plan.rows, sequences)
        sampling = [i for i, row in enumerate(plan.rows) if row.samples]
        scored = to_score(plan.rows, sequences)
        if scored:
            at = positions(scored, plan.rows, torch.from_numpy(chunks.ends)).numpy()
            chunks.logits_at = np.concatenate([chunks.logits_at, at])
        follows = self.drafter is not None and plan.follows and self._chain_runs
        inputs, logits, features = self.executor.prompts.run(chunks, bool(scored), follows)
        if self.drafter is not None and follows:
            slots = inputs.rows.slots
            step = self.state.step(slots, torch.zeros_like(slots), None)
            self.drafter.prefill_chunk(step, inputs.token_ids, inputs.rows, features)
        elif self.drafter is not None and not self.program.feature_layers:
            for row in plan.rows:
                self._behind.setdefault(row.slot, row.start)
        scores = PromptScores(scored, logits[len(sampling) :]) if scored else None
        if not sampling:
            return Launched(timer, sequences, chunks.num_tokens, [], None, 1, scores=scores, chained=follows)
        launched = self._decide_prompts(sequences, sampling, logits[: len(sampling)], timer, chunks.num_tokens)
        launched.scores, launched.chained = scores, follows
        return launched

    def _decide_prompts(
        self, sequences: list[Sequence], sampling: list[int], logits: Tensor, timer: StepTimer, num_run: int
    ) -> Launched:
        """The first tokens of prompts that end: half B of a step without drafts, on these logits.

        The drafter has seen their chunks, features of the last token included.
        """
        num_rows, count = tier_of(self.executor.tiers, len(sampling)), len(sampling)
        self.executor.send(num_rows, 0, [sequences[row].slot for row in sampling], [0] * count, [])
        self.executor.stage_prompts(num_rows, logits)
        return self._decide(num_rows, 0, sequences, sampling, timer, num_run)
