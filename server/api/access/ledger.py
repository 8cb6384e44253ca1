"""What every key used in the last 60 seconds, over all API processes, without locks.

    uint32 [workers, names, (second, requests, tokens), 60]

A worker adds to its own row, in the bucket of the present second; the sum over all workers' buckets that are younger
than 60 seconds is what was used. Time is the host's monotonic clock, which all processes share.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from server.api.access import shared
from server.api.access.keys import MAX_NAMES

WINDOW_S = 60
_SECOND, _REQUESTS, _TOKENS = 0, 1, 2
_MOST = 2**32 - 1

Clock = Callable[[], float]


@dataclass(frozen=True, slots=True)
class Usage:
    """Of one key in the window, and in how many seconds each will have left it altogether."""

    requests: int
    tokens: int
    requests_empty_in_s: float
    tokens_empty_in_s: float


class Ledger:
    """`path` None: for one process. Else `Ledger.create` makes the file once and every worker opens it.

    `worker` is this process's row; a process that takes a dead one's place may take its row. One key's numbers are
    exact up to 2**32 - 1 a second and worker.
    """

    def __init__(
        self, path: str | Path | None = None, num_workers: int = 1, worker: int = 0, clock: Clock = time.monotonic
    ) -> None:
        self._clock = clock
        self._all: NDArray[Any] = shared.attach(path, _shape(num_workers), np.uint32)
        self._own = self._all[worker]

    @staticmethod
    def create(path: str | Path, num_workers: int) -> None:
        """An empty ledger for this many workers."""
        shared.create(path, math.prod(_shape(num_workers)) * 4)

    def add(self, row: int, num_requests: int, num_tokens: int) -> None:
        """Books use in the present second."""
        second = self._second()
        bucket = self._own[row, :, second % WINDOW_S]
        if bucket[_SECOND] != second:
            # No reader may take the old counts for the new second's: the stamp goes first and comes back last.
            bucket[_SECOND] = 0
            bucket[_REQUESTS] = 0
            bucket[_TOKENS] = 0
            bucket[_SECOND] = second
        if num_requests:
            bucket[_REQUESTS] = min(int(bucket[_REQUESTS]) + num_requests, _MOST)
        if num_tokens:
            bucket[_TOKENS] = min(int(bucket[_TOKENS]) + num_tokens, _MOST)

    def used(self, row: int) -> tuple[int, int]:
        """Requests and tokens in the window."""
        buckets = self._all[:, row]
        live = buckets[:, _SECOND] > self._second() - WINDOW_S
        return int(buckets[:, _REQUESTS][live].sum()), int(buckets[:, _TOKENS][live].sum())

    def usage(self, row: int) -> Usage:
        """Both sums and when they will be zero."""
        buckets = self._all[:, row]
        seconds = buckets[:, _SECOND]
        live = seconds > self._second() - WINDOW_S
        sums, waits = [], []
        for kind in (_REQUESTS, _TOKENS):
            counts = buckets[:, kind] * live  # of zeros where the bucket is too old
            total = int(counts.sum())
            sums.append(total)
            waits.append(self._leaves_in_s(int(seconds[counts > 0].max())) if total else 0.0)
        return Usage(sums[0], sums[1], waits[0], waits[1])

    def retry_after_s(self, row: int, *, num_requests: int = 0, num_tokens: int = 0) -> float:
        """Seconds until at least this many requests and tokens of the window have left it; 0 where none need to.

        Asked for more than there is, when the window is empty.
        """
        buckets = self._all[:, row]
        now = self._second()
        seconds, requests, tokens = (buckets[:, kind].reshape(-1).astype(np.int64) for kind in range(3))
        wait = 0.0
        for needed, counts in ((num_requests, requests), (num_tokens, tokens)):
            if needed <= 0:
                continue
            live = np.flatnonzero((seconds > now - WINDOW_S) & (counts > 0))
            if live.size == 0:
                continue
            order = live[np.argsort(seconds[live], kind="stable")]
            freed = np.cumsum(counts[order])
            last = min(int(np.searchsorted(freed, needed)), order.size - 1)
            wait = max(wait, self._leaves_in_s(int(seconds[order[last]])))
        return wait

    def _second(self) -> int:
        # From 60 on, so that the zeros of a new file are never in the window.
        return int(self._clock()) + WINDOW_S

    def _leaves_in_s(self, second: int) -> float:
        return max(0.0, second - self._clock())


def _shape(num_workers: int) -> tuple[int, ...]:
    return num_workers, MAX_NAMES, 3, WINDOW_S
