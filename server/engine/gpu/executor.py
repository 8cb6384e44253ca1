"""Runs the two halves of a step, from captured graphs where there are any, and makes them ready at start-up."""

from __future__ import annotations

import logging
import statistics
import time
from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor

from server.engine.gpu.graphs import Graphs
from server.engine.gpu.kinds import SamplingClass
from server.engine.gpu.launched import StepTimer
from server.engine.gpu.prefill import nobodys_chunks
from server.engine.gpu.prompt_graphs import PromptGraphs
from server.engine.gpu.step import Staged, StepProgram
from server.engine.gpu.tiers import batch_tiers, tier_of
from server.engine.memory import is_out_of_memory
from server.kernels.paged import PagedRows
from server.spec.types import Drafts

log = logging.getLogger("outpace.engine")

GREEDY = SamplingClass.GREEDY
_FEW_TOKENS = 16


class Executor:
    """One `StepProgram` for every (batch tier, k) of `tiers` and `k_tiers`, and its network on prompt chunks.

    `prompt_tokens`: the most tokens of a prefill step, where small ones are to run from graphs; else 0.
    """

    def __init__(
        self,
        program: StepProgram,
        max_num_seqs: int,
        k_tiers: tuple[int, ...],
        use_graphs: bool,
        prompt_tokens: int = 0,
    ) -> None:
        self.program = program
        self.tiers, self.k_tiers = batch_tiers(max_num_seqs), (0, *k_tiers)
        self.device = program.state.block_tables.device
        self.graphs = Graphs(self.device, use_graphs)
        self.prompts = PromptGraphs(program, self.graphs, max_num_seqs, prompt_tokens)
        self._nobody = max_num_seqs
        self._staged: dict[tuple[int, int], Staged] = {}

    # -- a step --------------------------------------------------------------------------------------------

    def send(self, num_rows: int, k: int, slots: list[int], limits: list[int], updates: list[int]) -> None:
        """The inputs of a step of `num_rows` rows, those behind `slots` being padding."""
        fields = self.program.fields(num_rows, k)
        buffer = self.program.inputs.begin()
        padding = num_rows - len(slots)
        buffer[fields.slots] = slots + [self._nobody] * padding
        buffer[fields.limits] = limits + [0] * padding
        room = buffer[fields.updates]
        room[: len(updates)] = updates
        room[len(updates) :] = 0
        room[len(updates) :: 3] = self._nobody
        if fields.upload_width:
            assert self.program.drafter is not None
            sent = buffer[fields.uploads].reshape(num_rows, fields.upload_width)
            if slots:
                sent[: len(slots)] = self.program.drafter.upload(slots, limits, k)
            sent[len(slots) :] = 0
        self.program.inputs.send(fields.size)

    def forward(self, num_rows: int, k: int, chain: bool = True, follows: bool = False) -> None:
        """Half A, on the inputs that were sent last; without `chain` a hybrid drafter only copies. `follows`: no
        drafts, and `follow` comes behind half B.
        """
        if follows:
            self.graphs.run(("forward", num_rows, "followed"), partial(self._forward_followed, num_rows))
        elif chain or k == 0:
            self.graphs.run(("forward", num_rows, k), partial(self._forward, num_rows, k))
        else:
            self.graphs.run(("copies", num_rows, k), partial(self._copies, num_rows, k))

    def verify(self, num_rows: int, k: int, kind: SamplingClass) -> None:
        """Half B, on what half A of the same (rows, k) or `stage_prompts` has left."""
        self.graphs.run(("verify", num_rows, k, kind.name), partial(self._verify, num_rows, k, kind))

    def follow(self, num_rows: int) -> None:
        """Behind both halves of a step without drafts whose half A was told so: the drafter sees it."""
        self.graphs.run(("follow", num_rows), partial(self._follow, num_rows))

    def stage_prompts(self, num_rows: int, logits: Tensor) -> None:
        """Puts logits [R, V] of prompts' last tokens where half A without drafts leaves its own."""
        staged = self._staged.get((num_rows, 0))
        if staged is None:  # without graphs there may have been no such step yet
            room = logits.new_zeros(num_rows, logits.shape[1])
            staged = self._staged[num_rows, 0] = Staged(self.program.no_drafts(num_rows), room, None)
        staged.logits[: logits.shape[0]].copy_(logits)

    def _forward(self, num_rows: int, k: int) -> None:
        self._staged[num_rows, k] = self.program.draft_and_forward(num_rows, k)

    def _copies(self, num_rows: int, k: int) -> None:
        """Half A without a chain leaves its results where half A with one does."""
        staged = self.program.draft_and_forward(num_rows, k, chain=False)
        kept = self._staged.setdefault((num_rows, k), staged)
        if kept is not staged:
            kept.overwrite(staged)

    def _forward_followed(self, num_rows: int) -> None:
        """Leaves its logits where half A without features does: half B is the same for both."""
        found = self.program.draft_and_forward(num_rows, 0, follows=True)
        staged = self._staged.setdefault((num_rows, 0), found)
        if staged is not found:
            staged.logits.copy_(found.logits)
            staged.features = found.features

    def _follow(self, num_rows: int) -> None:
        self.program.follow(num_rows, self._staged[num_rows, 0])

    def _verify(self, num_rows: int, k: int, kind: SamplingClass) -> None:
        self.program.verify(num_rows, k, kind, self._staged[num_rows, k])

    # -- start-up ------------------------------------------------------------------------------------------

    def capture(self, kinds: tuple[SamplingClass, ...] = tuple(SamplingClass)) -> None:
        """Captures every graph that a step can need, largest first; nothing runs on a real slot.

        Where memory does not suffice for all of them, prompt tiers are given up, the largest first: they were chosen
        before there were others. Raises torch's OutOfMemoryError if it does not suffice without any.
        """
        while not self._fits(kinds):
            given_up = self.prompts.tiers[-1]
            self.prompts.tiers = self.prompts.tiers[:-1]
            log.warning("no memory for a graph of prompt chunks of %d tokens: they run eagerly", given_up)

    def _fits(self, kinds: tuple[SamplingClass, ...]) -> bool:
        """Whether all graphs could be captured; what a failure holds is free again when this has returned."""
        try:
            self._capture(kinds)
        except RuntimeError as error:
            if not self.prompts.tiers or not is_out_of_memory(error):
                raise
            return False
        return True

    def _capture(self, kinds: tuple[SamplingClass, ...]) -> None:
        self.graphs.clear()
        self._staged.clear()
        self.prompts.capture()
        for num_rows in reversed(self.tiers):
            for k in reversed(self.k_tiers):
                self._capture_pair(num_rows, k, kinds)

    def _capture_pair(self, num_rows: int, k: int, kinds: tuple[SamplingClass, ...]) -> None:
        self.send(num_rows, k, [], [], [])
        self.graphs.capture(("forward", num_rows, k), partial(self._forward, num_rows, k))
        if k > 0 and self.program.can_copy:
            self.graphs.capture(("copies", num_rows, k), partial(self._copies, num_rows, k))
        follows = k == 0 and bool(self.program.feature_layers)
        if follows:  # before half B, which then takes no memory that holds the features in between
            self.graphs.capture(("forward", num_rows, "followed"), partial(self._forward_followed, num_rows))
        for kind in kinds:
            self.graphs.capture(("verify", num_rows, k, kind.name), partial(self._verify, num_rows, k, kind))
        if follows:
            self.graphs.capture(("follow", num_rows), partial(self._follow, num_rows))
        if k > 0:
            self._staged.pop((num_rows, k), None)  # its memory serves the next pair; k = 0 also serves prompts

    def warm_up_jobs(self, prompt_tokens: int) -> list[Callable[[], object]]:
        """Launches of every kernel of a step but the drafter's chain, on nothing: to be compiled side by side.

        `prompt_tokens`: the most tokens of a prefill step, in graphs or not.
        """
        steps = [partial(self._warm_up, num_rows, k) for num_rows in self.tiers for k in self.k_tiers]
        return [*steps, *self.prompts.warm_up_jobs(), *self.chunk_jobs(prompt_tokens)]

    def chunk_jobs(self, most_tokens: int) -> list[Callable[[], object]]:
        """Ragged chunks as they run eagerly, of which larger ones have other tiles, with what a drafter does that
        reads no features; one that does has no kernels there that its chain has not.
        """
        return [partial(self._warm_up_chunk, size) for size in sorted({min(_FEW_TOKENS, most_tokens), most_tokens})]

    def _warm_up_chunk(self, num_tokens: int) -> None:
        state, drafter = self.program.state, self.program.drafter
        chunks = nobodys_chunks(num_tokens, self._nobody, state)
        inputs, _, _ = self.prompts.run(chunks, lasting=True)
        if drafter is not None and not self.program.feature_layers:
            step = state.step(inputs.rows.slots, torch.zeros_like(inputs.rows.slots), None)
            drafter.prefill_chunk(step, inputs.token_ids, inputs.rows, None)

    def _warm_up(self, num_rows: int, k: int) -> None:
        self.send(num_rows, k, [], [], [])
        program, state = self.program, self.program.state
        zeros = torch.zeros(num_rows * (1 + k), dtype=torch.int64, device=self.device)
        slots = torch.full((num_rows,), self._nobody, dtype=torch.int64, device=self.device)
        rows = PagedRows(
            slots, torch.zeros_like(slots), state.block_tables, state.block_size, state.max_context, width=1 + k
        )
        logits, _ = program.forward(zeros, state.pools, rows, zeros, zeros, None, program.feature_layers)
        drafts = Drafts(zeros.view(num_rows, -1)[:, :k].contiguous(), torch.zeros_like(slots))
        for kind in SamplingClass:
            program.verify(num_rows, k, kind, Staged(drafts, logits, None, complete=False))

    def time_step(
        self, num_rows: int, k: int, context: int, repeats: int = 3, chain: bool = True, follows: bool = False
    ) -> float:
        """Milliseconds of a greedy step of `num_rows` rows with `k` drafts and `context` tokens before, drafts
        included; `follows`: of one without drafts that the drafter sees.

        For start-up, before any request: it uses the first slots and whatever blocks, and leaves the slots unused.
        """
        state, timer = self.program.state, StepTimer(self.device)
        slots, tables, size = state.slots, state.block_tables, state.block_size
        per_row = -(-(context + (repeats + 1) * (1 + k)) // size)
        num_blocks = state.pools[0].shape[0] // size
        blocks = torch.arange(num_rows * per_row, device=self.device) % (num_blocks - 1) + 1
        width = min(per_row, tables.shape[1])
        tables[:num_rows, :width] = blocks.view(num_rows, per_row)[:, :width].to(tables.dtype)
        slots.num_tokens[:num_rows] = context
        rows = tier_of(self.tiers, num_rows)
        taken = []
        for attempt in range(1 + repeats):
            uploads = self.program.upload_width(k) > 0  # what a host-side drafter sends costs the host, not the step
            self.send(rows, k, [] if uploads else list(range(num_rows)), [] if uploads else [k] * num_rows, [])
            if uploads:
                self.program.inputs.device[:num_rows] = torch.arange(num_rows, device=self.device)
            timer.start()
            started = time.perf_counter()
            self.forward(rows, k, chain, follows)
            self.verify(rows, k, GREEDY)
            if follows:
                self.follow(rows)
            timer.end()
            elapsed = timer.wait() or (time.perf_counter() - started) * 1e3
            if attempt:
                taken.append(elapsed)
        slots.num_tokens[:num_rows] = 1
        tables[:num_rows] = 0
        return statistics.median(taken)
