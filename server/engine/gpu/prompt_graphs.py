"""The network on prompt chunks: small ones from CUDA graphs, padded to a tier of tokens, the others eagerly.

Launched one by one, the kernels of a prompt chunk cost the host the same time (10 to 20 ms for 30 layers) however few
its tokens are. A graph saves that, but its shapes are fixed: a chunk is padded to the smallest tier that holds it, and
the padding costs the device. So tiers have graphs as far as the device needs less time for one than the host needs to
launch it, which is measured at start-up.
"""

from __future__ import annotations

import logging
import time
from bisect import bisect_left
from collections.abc import Callable
from functools import partial

import numpy as np
import torch
from torch import Tensor

from server.engine.gpu.graphs import Graphs, Run
from server.engine.gpu.launched import StepTimer
from server.engine.gpu.prefill import Chunks, Inputs, Layout, inputs_in
from server.engine.gpu.staging import Upload
from server.engine.gpu.step import StepProgram
from server.engine.gpu.tiers import token_tiers
from server.spec.upload import to_device

log = logging.getLogger("outpace.engine")

MOST_ROWS = 64
_MARGIN = 0.9
_REPEATS = 3
_WARM_UP_TOKENS = 128
"""Tiers up to here launch every kernel there is: the fused layers' plans, and the way through cuBLAS once."""


class PromptGraphs:
    """One graph a tier of tokens, all of them for the same number of rows (a tier of N tokens has at most N).

    `tiers`: the tiers in use, ascending; none at first. Graphs take their inputs from one static buffer and leave their
    results in another, for what runs next on the stream: both change with the next prompt chunk. Neither is memory of
    the graphs, which is other graphs' memory too. What a drafter does with a chunk is not part of its graph.

    Without graphs (`Graphs.enabled` False) chunks are padded to `tiers` all the same.
    """

    def __init__(self, program: StepProgram, graphs: Graphs, max_num_seqs: int, budget: int) -> None:
        """`budget`: the most tokens of a prefill step; 0: no tiers."""
        self.program, self.graphs = program, graphs
        self.tiers: tuple[int, ...] = ()
        self.max_rows = min(max_num_seqs, MOST_ROWS)
        self._budget, self._nobody = budget, max_num_seqs
        state = program.state
        self.candidates = token_tiers(min(budget, self.max_rows * state.max_context))
        self._device = state.block_tables.device
        self._inputs = Upload(self._layout(self.candidates[-1]).size if self.candidates else 0, self._device)
        self._logits: Tensor | None = None
        self._features: Tensor | None = None

    def _layout(self, tier: int) -> Layout:
        num_rows = min(self.max_rows, tier)
        return Layout.of(tier, num_rows, num_rows)

    # -- a step --------------------------------------------------------------------------------------------

    def run(self, chunks: Chunks, lasting: bool = False, follows: bool = True) -> tuple[Inputs, Tensor, Tensor | None]:
        """The network on `chunks`: their inputs, logits [T, V] at the wanted tokens, features [N, F] if it `follows`.

        `lasting`: they may be read even after the next chunks have run. Such chunks, and those that want more logits
        than one a row, run eagerly. `follows`: the drafter sees them.
        """
        tier = None if lasting else self.tier_of(chunks)
        layers = self.program.feature_layers if follows else ()
        if tier is None:
            return self._run_eagerly(chunks, layers)
        layout, state = self._layout(tier), self.program.state
        chunks.fill(self._inputs.begin()[: layout.size], layout, state.block_size, self._nobody)
        self._inputs.send(layout.size)
        self.graphs.run(("prompts", tier, bool(layers)), partial(self._forward, tier, layers))
        assert self._logits is not None
        features = self._features[: chunks.num_tokens] if layers and self._features is not None else None
        inputs = inputs_in(self._inputs.device, layout, state, chunks)
        return inputs, self._logits[: chunks.num_logits], features

    def tier_of(self, chunks: Chunks) -> int | None:
        """The smallest tier in use that holds `chunks`, if there is one."""
        fits = chunks.num_rows <= self.max_rows and chunks.num_logits <= chunks.num_rows
        at = bisect_left(self.tiers, chunks.num_tokens)
        return self.tiers[at] if fits and at < len(self.tiers) else None

    def _run_eagerly(self, chunks: Chunks, layers: tuple[int, ...]) -> tuple[Inputs, Tensor, Tensor | None]:
        layout, state = Layout.of(chunks.num_tokens, chunks.num_rows, chunks.num_logits), self.program.state
        buffer = np.empty(layout.size, dtype=np.int64)
        chunks.fill(buffer, layout, state.block_size, self._nobody)
        inputs = inputs_in(to_device(buffer, self._device), layout, state, chunks)
        return inputs, *self._network(inputs, layers)

    def _network(self, inputs: Inputs, layers: tuple[int, ...]) -> tuple[Tensor, Tensor | None]:
        program = self.program
        return program.forward(
            inputs.token_ids,
            program.state.pools,
            inputs.rows,
            inputs.positions,
            inputs.places,
            inputs.logits_at,
            layers,
        )

    def _forward(self, tier: int, layers: tuple[int, ...]) -> None:
        """What a graph holds."""
        inputs = inputs_in(self._inputs.device, self._layout(tier), self.program.state)
        logits, features = self._network(inputs, layers)
        self._logits = _keep(logits, self._logits, self.max_rows)
        if features is not None:
            self._features = _keep(features, self._features, tier)

    # -- start-up ------------------------------------------------------------------------------------------

    def warm_up_jobs(self) -> list[Callable[[], object]]:
        """Launches of every kernel of a prompt chunk, on nothing: to be compiled side by side."""
        return [partial(self._warm_up, tier) for tier in self.candidates if tier <= _WARM_UP_TOKENS]

    def _warm_up(self, tier: int) -> None:
        self._stand_in(tier, 0)
        self._forward(tier, self.program.feature_layers)

    def choose(self) -> None:
        """Measures which tiers pay and takes those into use; nothing is captured yet.

        The device's time rises with the tier, the host's does not: all tiers pay up to the last one that does.
        """
        if self.graphs.enabled:
            self.tiers = self.candidates[: bisect_left(self.candidates, True, key=lambda tier: not self._pays(tier))]

    def capture(self) -> None:
        """Captures the graphs of `tiers`, largest first; nothing runs on a real slot."""
        self._logits = self._features = None  # made again for the largest, which comes first
        for tier in reversed(self.tiers):
            for layers in dict.fromkeys((self.program.feature_layers, ())):
                self._stand_in(tier, 0)
                self.graphs.capture(("prompts", tier, bool(layers)), partial(self._forward, tier, layers))

    def _stand_in(self, tier: int, width: int) -> None:
        """Inputs of nobody's: rows of `width` tokens that fill the tier, or with 0 nothing but padding.

        They read and write block 0 only, which stays finite.
        """
        layout = self._layout(tier)
        buffer = np.zeros(layout.size, dtype=np.int64)
        offsets = buffer[layout.offsets]
        buffer[layout.slots] = self._nobody
        buffer[layout.positions] = np.arange(tier) % max(width, 1)
        offsets[:] = np.minimum(np.arange(len(offsets)) * width, tier)
        self._inputs.device[: layout.size].copy_(torch.from_numpy(buffer))  # the ring is for steps: here it may wait

    def _pays(self, tier: int) -> bool:
        """Whether a graph of `tier` runs in less time than the host needs to launch what it holds."""
        run = partial(self._forward, tier, self.program.feature_layers)
        self._stand_in(tier, min(tier, self.program.state.max_context))
        if not self._has_room(tier, run):
            return False
        launch_ms = min(self._launch_ms(run) for _ in range(_REPEATS))
        trial, timer, taken = Graphs(self._device, True), StepTimer(self._device), []
        trial.capture(tier, run)
        for _ in range(_REPEATS):
            timer.start()
            trial.run(tier, run)
            timer.end()
            taken.append(timer.wait())
        trial.clear()
        log.info("a prompt chunk of %d tokens: %.2f ms to launch, %.2f ms from a graph", tier, launch_ms, min(taken))
        return min(taken) < _MARGIN * launch_ms

    def _has_room(self, tier: int, run: Run) -> bool:
        """Whether memory holds a graph of `tier` and beside it what the largest prefill step needs, which runs eagerly.

        Also the first run of its shapes, which may compile and allocate.
        """
        torch.cuda.empty_cache()
        before = torch.cuda.memory_reserved(self._device)
        try:
            run()
        except torch.cuda.OutOfMemoryError:
            return False
        torch.cuda.synchronize(self._device)
        needed = torch.cuda.memory_reserved(self._device) - before
        torch.cuda.empty_cache()
        free, _ = torch.cuda.mem_get_info(self._device)
        return free > needed * (1 + self._budget / tier)

    def _launch_ms(self, run: Run) -> float:
        """How long the host is busy with it; the device is idle at first."""
        torch.cuda.synchronize(self._device)
        started = time.perf_counter()
        run()
        return (time.perf_counter() - started) * 1e3


def _keep(values: Tensor, room: Tensor | None, size: int) -> Tensor:
    """`values` [n, W] in `room`, made anew for `size` rows where it is too small: never while a graph is captured,
    since whatever is captured has just run eagerly."""
    if room is None or len(room) < len(values):
        room = values.new_empty(max(size, len(values)), values.shape[1])
    room[: len(values)].copy_(values)
    return room
