"""CUDA graphs by key: captured once at start-up, replayed every step, and counted where one is missing.

All graphs share one memory pool. They run one after another on one stream, and what graph A leaves for graph B is held
while B is captured, so memory may be used again by the next pair.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Hashable
from dataclasses import dataclass, field
from typing import Any

import torch

log = logging.getLogger("outpace.engine")

Run = Callable[[], None]


@dataclass(slots=True)
class GraphStats:
    """`num_misses` counts steps that ran eagerly though graphs were wanted; `memory_bytes` is what capturing took."""

    num_graphs: int = 0
    num_replays: int = 0
    num_misses: int = 0
    memory_bytes: int = 0
    missed: dict[str, int] = field(default_factory=dict)


class Graphs:
    """`enabled` False: everything runs eagerly, and nothing is missed."""

    def __init__(self, device: torch.device, enabled: bool) -> None:
        self.enabled = enabled and device.type == "cuda"
        self.stats = GraphStats()
        self._device = device
        self._graphs: dict[Hashable, Any] = {}
        self._pool: Any = None

    def capture(self, key: Hashable, run: Run) -> None:
        """Runs `run` once eagerly, which compiles and allocates what it needs, then captures it."""
        if not self.enabled:
            return
        run()
        torch.cuda.synchronize(self._device)
        before = torch.cuda.memory_reserved(self._device)
        if self._pool is None:
            self._pool = torch.cuda.graph_pool_handle()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, pool=self._pool, capture_error_mode="thread_local"):
            run()
        graph.replay()  # what is captured next runs eagerly on what this one leaves, which nothing has written yet
        self._graphs[key] = graph
        self.stats.num_graphs += 1
        self.stats.memory_bytes += max(0, torch.cuda.memory_reserved(self._device) - before)

    def run(self, key: Hashable, eagerly: Run) -> None:
        """Replays the graph of `key`; without one runs `eagerly`, and says so once a key."""
        graph = self._graphs.get(key)
        if graph is not None:
            self.stats.num_replays += 1
            graph.replay()
            return
        if self.enabled:
            name = str(key)
            if name not in self.stats.missed:
                log.warning("no CUDA graph for %s: this kind of step runs eagerly", name)
            self.stats.missed[name] = self.stats.missed.get(name, 0) + 1
            self.stats.num_misses += 1
        eagerly()

    def clear(self) -> None:
        """Forgets every graph, once none of them runs any more."""
        if self._graphs:
            torch.cuda.synchronize(self._device)
        self._graphs.clear()
        self._pool = None
        self.stats = GraphStats()
