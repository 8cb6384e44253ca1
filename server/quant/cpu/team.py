"""Threads that run one compiled function together.

Compiled functions hold no interpreter lock, so ordinary threads do. A thread looks out for the next call for a moment
before it sleeps: a chain of drafts is a call each fraction of a millisecond, and waking takes as long at busy times.
"""

from __future__ import annotations

import threading
from collections.abc import Callable
from functools import cache
from queue import SimpleQueue
from typing import Any

import numpy as np
from numpy.typing import NDArray

from server.quant.cpu.barrier import BARRIER_BYTES, atomic_load, pause
from server.quant.cpu.product import aligned
from server.quant.cpu.vectors import jit

LOOKS = 4000
"""Before a thread sleeps; some 100 microseconds."""

Call = tuple[Callable[..., None], tuple[Any, ...]]


@jit
def look_out(posted, seen, looks):
    """Returns when the count at address `posted` is no longer `seen`, or after so many looks."""
    for _ in range(looks):
        if atomic_load(posted) != seen:
            return
        pause()


class Team:
    """`size` threads, the caller among them. Not to be shared by threads that call at the same time."""

    def __init__(self, size: int) -> None:
        self.size = size
        self._barrier = aligned(BARRIER_BYTES)
        self._barrier[:] = 0
        self.barrier = int(self._barrier.ctypes.data)
        """Address of the barrier that the functions meet at."""
        self._queues: list[SimpleQueue[Call]] = [SimpleQueue() for _ in range(size - 1)]
        self._posted = np.zeros(1, dtype=np.int64)
        for number, queue in enumerate(self._queues, start=1):
            arguments = (queue, self._posted)
            threading.Thread(target=_work, args=arguments, name=f"cpu-kernels-{number}", daemon=True).start()

    def run(self, function: Callable[..., None], arguments: list[tuple[Any, ...]]) -> None:
        """Calls `function` with `arguments[i]` on thread i. It must be compiled, and end with a barrier of all."""
        self._posted[0] += 1
        for queue, given in zip(self._queues, arguments[1:], strict=True):
            queue.put((function, given))
        function(*arguments[0])


def _work(queue: SimpleQueue[Call], posted: NDArray[np.int64]) -> None:
    while True:
        function, given = queue.get()
        seen = int(posted[0])
        function(*given)
        del function, given
        look_out(posted.ctypes.data, seen, LOOKS)


@cache
def team(size: int) -> Team:
    """The process's team of that size."""
    return Team(size)
