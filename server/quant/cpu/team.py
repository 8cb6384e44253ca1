"""Threads that run one compiled function together.

Compiled functions hold no interpreter lock, so ordinary threads do; they sleep between steps. Nothing spins beside
torch's threads.
"""

from __future__ import annotations

import threading
from collections.abc import Callable
from functools import cache
from queue import SimpleQueue
from typing import Any

from server.quant.cpu.barrier import BARRIER_BYTES
from server.quant.cpu.product import aligned

Call = tuple[Callable[..., None], tuple[Any, ...]]


class Team:
    """`size` threads, the caller among them. Not to be shared by threads that call at the same time."""

    def __init__(self, size: int) -> None:
        self.size = size
        self._barrier = aligned(BARRIER_BYTES)
        self._barrier[:] = 0
        self.barrier = int(self._barrier.ctypes.data)
        """Address of the barrier that the functions meet at."""
        self._queues: list[SimpleQueue[Call]] = [SimpleQueue() for _ in range(size - 1)]
        for number, queue in enumerate(self._queues, start=1):
            threading.Thread(target=_work, args=(queue,), name=f"cpu-kernels-{number}", daemon=True).start()

    def run(self, function: Callable[..., None], arguments: list[tuple[Any, ...]]) -> None:
        """Calls `function` with `arguments[i]` on thread i. It must be compiled, and end with a barrier of all."""
        for queue, given in zip(self._queues, arguments[1:], strict=True):
            queue.put((function, given))
        function(*arguments[0])


def _work(queue: SimpleQueue[Call]) -> None:
    while True:
        function, given = queue.get()
        function(*given)
        del function, given


@cache
def team(size: int) -> Team:
    """The process's team of that size."""
    return Team(size)
