"""The whole server's metrics, from those of its workers and the owner's own of the engines."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Callable
from itertools import count

from server.api.pool.messages import Snapshot
from server.telemetry.merge import Family, merged
from server.telemetry.metrics import Metrics
from server.telemetry.report import Report
from server.telemetry.windows import Slot, current

_ANSWER_S = 1.0
"""How long a scrape waits for the workers; of one that is slower the last snapshot counts."""


class PoolMetrics:
    """`own` has the engines'. `ask(number)` makes every worker send a snapshot with that number."""

    def __init__(self, own: Metrics, ask: Callable[[int], None]) -> None:
        self.own = own
        self._ask = ask
        self._numbers = count(1)
        self._latest: dict[bytes, Snapshot] = {}
        self._retired = Snapshot(0, [], [])
        self._rounds: dict[int, _Round] = {}
        self._tasks: set[asyncio.Task[None]] = set()

    def take(self, identity: bytes, snapshot: Snapshot) -> None:
        """A worker's metrics."""
        self._latest[identity] = snapshot
        asked = self._rounds.get(snapshot.number)
        if asked is not None:
            asked.missing.discard(identity)
            asked.check()

    def retire(self, identity: bytes) -> None:
        """The worker is gone: what it counted still counts."""
        last = self._latest.pop(identity, None)
        if last is not None:
            slots = current([*self._retired.slots, *last.slots], self.own.clock())
            self._retired = Snapshot(0, merged([self._retired.families, last.families]), slots)
        for asked in self._rounds.values():
            asked.missing.discard(identity)
            asked.check()

    def report_soon(self, identities: set[bytes], done: Callable[[Report], None]) -> None:
        """Calls `done` once every worker has answered, or has had its time."""
        task = asyncio.ensure_future(self._report(identities, done))
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    async def _report(self, identities: set[bytes], done: Callable[[Report], None]) -> None:
        number = next(self._numbers)
        asked = self._rounds[number] = _Round(identities)
        self._ask(number)
        try:
            with contextlib.suppress(TimeoutError):  # of a worker that is late the last snapshot counts
                async with asyncio.timeout(_ANSWER_S):
                    await asked.complete.wait()
        finally:
            del self._rounds[number]
        done(self.report())

    def report(self) -> Report:
        """From what is known now."""
        known = [self._retired, *self._latest.values()]
        families: list[Family] = merged([snapshot.families for snapshot in known])
        slots: list[Slot] = [slot for snapshot in known for slot in snapshot.slots]
        return self.own.report(families, slots)


class _Round:
    def __init__(self, identities: set[bytes]) -> None:
        self.missing = set(identities)
        self.complete = asyncio.Event()
        self.check()

    def check(self) -> None:
        if not self.missing:
            self.complete.set()
