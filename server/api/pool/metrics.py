"""The whole server's metrics, from those of its workers and the owner's own of the engine."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Callable
from itertools import count

from prometheus_client import CollectorRegistry, generate_latest

from server.api.pool.messages import Snapshot
from server.telemetry.merge import Family, MergedCollector, merged
from server.telemetry.metrics import Metrics

_ANSWER_S = 1.0
"""How long a scrape waits for the workers; of one that is slower the last snapshot counts."""


class PoolMetrics:
    """`own` has the engine's. `ask(number)` makes every worker send a snapshot with that number."""

    def __init__(self, version: str, ask: Callable[[int], None]) -> None:
        self.own = Metrics(version)
        self._ask = ask
        self._numbers = count(1)
        self._latest: dict[bytes, list[Family]] = {}
        self._retired: list[Family] = []
        self._rounds: dict[int, _Round] = {}
        self._tasks: set[asyncio.Task[None]] = set()
        self._merged = MergedCollector()
        self._registry = CollectorRegistry(auto_describe=False)
        self._registry.register(self._merged)

    def take(self, identity: bytes, snapshot: Snapshot) -> None:
        """A worker's metrics."""
        self._latest[identity] = snapshot.families
        asked = self._rounds.get(snapshot.number)
        if asked is not None:
            asked.missing.discard(identity)
            asked.check()

    def retire(self, identity: bytes) -> None:
        """The worker is gone: what it counted still counts."""
        self._retired = merged([self._retired, self._latest.pop(identity, [])])
        for asked in self._rounds.values():
            asked.missing.discard(identity)
            asked.check()

    def render_soon(self, identities: set[bytes], done: Callable[[bytes], None]) -> None:
        """Calls `done` with the text once every worker has answered, or has had its time."""
        task = asyncio.ensure_future(self._render(identities, done))
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    async def _render(self, identities: set[bytes], done: Callable[[bytes], None]) -> None:
        number = next(self._numbers)
        asked = self._rounds[number] = _Round(identities)
        self._ask(number)
        try:
            with contextlib.suppress(TimeoutError):  # of a worker that is late the last snapshot counts
                async with asyncio.timeout(_ANSWER_S):
                    await asked.complete.wait()
        finally:
            del self._rounds[number]
        done(self.render())

    def render(self) -> bytes:
        """From what is known now."""
        self._merged.families = merged([self._retired, *self._latest.values()])
        return generate_latest(self._registry) + self.own.render_engine()


class _Round:
    def __init__(self, identities: set[bytes]) -> None:
        self.missing = set(identities)
        self.complete = asyncio.Event()
        self.check()

    def check(self) -> None:
        if not self.missing:
            self.complete.set()
