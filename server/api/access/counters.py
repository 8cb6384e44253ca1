"""Gauges over all API processes: what is in flight and what waits, so that one bound holds for all of them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from server.api.access import shared

_WORDS_A_LINE = 8
"""A worker's numbers have a cache line of their own: writers do not slow each other down."""


class SharedCounts:
    """Two gauges, a row a worker: sequences in flight and prompt tokens that wait.

    `path` None: for one process. Else `SharedCounts.create` makes the file once and every worker opens it.
    """

    def __init__(self, path: str | Path | None = None, num_workers: int = 1, worker: int = 0) -> None:
        self._all: NDArray[Any] = shared.attach(path, (num_workers, _WORDS_A_LINE), np.int64)
        self._worker = worker
        self._in_flight = 0
        self._waiting_tokens = 0
        self.clear(worker)

    @staticmethod
    def create(path: str | Path, num_workers: int) -> None:
        """All zero, for this many workers."""
        shared.create(path, num_workers * _WORDS_A_LINE * 8)

    def add(self, num_in_flight: int = 0, num_waiting_tokens: int = 0) -> None:
        """Changes this worker's numbers; give them back with negative ones."""
        self._in_flight += num_in_flight
        self._waiting_tokens += num_waiting_tokens
        own = self._all[self._worker]
        own[0], own[1] = self._in_flight, self._waiting_tokens

    def clear(self, worker: int) -> None:
        """A worker died: what it held is gone. A worker's own row is cleared when it opens it."""
        self._all[worker] = 0

    def own(self) -> tuple[int, int]:
        """Sequences in flight and waiting prompt tokens of this worker."""
        return self._in_flight, self._waiting_tokens

    def total(self) -> tuple[int, int]:
        """The same, over all workers."""
        if len(self._all) == 1:
            return self._in_flight, self._waiting_tokens
        in_flight, waiting_tokens, *_ = self._all.sum(axis=0).tolist()
        return in_flight, waiting_tokens
