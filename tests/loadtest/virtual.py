"""Runs client and reference server in one event loop whose time is made up: nothing is late, and seconds pass at
once."""

from __future__ import annotations

import asyncio
import selectors
import time
from collections.abc import Iterator, Mapping
from typing import Any
from unittest import mock

from loadtest.distribution import constant
from loadtest.measure import Seen
from loadtest.plan import Server, job_of
from loadtest.processes import generate
from loadtest.settings import Asked, Load, Settings, Target
from tests.loadtest.reference_server import Connection, State

_DELIVERY_S = 0.0005
"""Real time in which what was written to a local socket can surely be read."""


class Clock(selectors.BaseSelector):
    """A selector that, where nothing is to be read, moves the clock on in place of waiting."""

    def __init__(self) -> None:
        self.now = 1000.0
        self._real = selectors.DefaultSelector()

    def time(self) -> float:
        """Seconds, for whoever asks."""
        return self.now

    def select(self, timeout: float | None = None) -> list[tuple[selectors.SelectorKey, int]]:
        """What is ready; else time has passed by `timeout`."""
        ready = self._real.select(0)
        if not ready and (timeout is None or timeout > 0):
            ready = self._real.select(_DELIVERY_S)
            if not ready and timeout is not None:
                self.now += timeout
        return ready

    def register(self, fileobj: Any, events: int, data: Any = None) -> selectors.SelectorKey:
        """As the real one does."""
        return self._real.register(fileobj, events, data)

    def unregister(self, fileobj: Any) -> selectors.SelectorKey:
        """As the real one does."""
        return self._real.unregister(fileobj)

    def modify(self, fileobj: Any, events: int, data: Any = None) -> selectors.SelectorKey:
        """As the real one does."""
        return self._real.modify(fileobj, events, data)

    def get_map(self) -> Mapping[Any, selectors.SelectorKey]:
        """As the real one does."""
        return self._real.get_map()

    def close(self) -> None:
        """As the real one does."""
        self._real.close()


def asked(num_tokens: int, **fields: Any) -> Asked:
    """A small synthetic workload."""
    return Asked(input_tokens=constant(20), output_tokens=constant(num_tokens), **fields)


def run(script: dict[str, Any], load: Load, workload: Asked, *, way: str = "usage", warmup_s: float = 0.0) -> Seen:
    """One run of one process against a server that follows `script`."""
    clock = Clock()

    async def both() -> Seen:
        state = State()
        state.script = script
        loop = asyncio.get_running_loop()
        server = await loop.create_server(lambda: Connection(state), "127.0.0.1", 0)
        url = f"http://127.0.0.1:{server.sockets[0].getsockname()[1]}"
        settings = Settings(Target(url, timeout_s=60.0), load, workload, warmup_s=warmup_s)
        job = job_of(settings, Server("reference", way), 0)
        records, health = await generate(job, time.monotonic() + 0.1, lambda progress: None)
        server.close()
        records.sort(key=lambda record: record.intended)
        return Seen(records, [health], warmup_s)

    # The event loop's own time is time.monotonic too.
    with (
        mock.patch.object(time, "monotonic", clock.time),
        asyncio.Runner(loop_factory=lambda: asyncio.SelectorEventLoop(clock)) as runner,
    ):
        return runner.run(both())


def numbers(value: Any) -> Iterator[float]:
    """A script's value without end: one number again and again, or a list's in turn."""
    values = value if isinstance(value, list) else [value]
    while True:
        yield from values
