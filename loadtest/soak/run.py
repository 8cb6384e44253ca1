"""A soak: calm, traffic, rest, calm again."""

from __future__ import annotations

import asyncio
import os
import signal
import statistics
import time
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass, field

import aiohttp

from loadtest.plan import Server
from loadtest.settings import Settings
from loadtest.soak import watch
from loadtest.soak.settings import SoakSettings
from loadtest.soak.traffic import Traffic
from loadtest.soak.ways import ANSWERED, End

_ALONE = 7
"""Requests one after another that tell the latency of a server at rest."""
_SAMPLE_S = 0.25
_TELL_S = 5.0
_GRACE_S = 1.0
"""A server may say that it is ready before it has seen that its engine is dead."""


@dataclass(slots=True)
class Soaked:
    """What was seen. `alone` are seconds of single requests, `idle` what the server held at rest, before and after."""

    ends: list[End] = field(default_factory=list)
    begun: int = 0
    kills: list[list[float]] = field(default_factory=list)
    samples: list[watch.Held] = field(default_factory=list)
    alone: list[list[float]] = field(default_factory=list)
    idle: list[watch.Held] = field(default_factory=list)
    metrics: list[dict[str, float]] = field(default_factory=list)
    rested_s: float | None = None


@asynccontextmanager
async def connected(settings: Settings) -> AsyncIterator[aiohttp.ClientSession]:
    """A session whose connections are closed behind it, so that the server can be seen at rest."""
    headers = {"Content-Type": "application/json", **settings.target.headers}
    connector = aiohttp.TCPConnector(limit=0)
    timeout = aiohttp.ClientTimeout(total=settings.target.timeout_s, sock_connect=30)
    async with aiohttp.ClientSession(headers=headers, connector=connector, timeout=timeout) as http:
        yield http


class Soak:
    """Runs one; `tell` gets a line now and then."""

    def __init__(self, settings: Settings, soak: SoakSettings, server: Server, tell: Callable[[str], None]) -> None:
        self._settings, self._soak, self._server, self._tell = settings, soak, server, tell
        self._started = time.monotonic()
        self._traffic: Traffic | None = None
        self.seen = Soaked()

    @property
    def now(self) -> float:
        """Seconds since the start."""
        return time.monotonic() - self._started

    async def run(self) -> Soaked:
        """Everything; what was seen."""
        await self._calm()
        await self._storm()
        self.seen.rested_s = await self._rest()
        await self._calm()
        return self.seen

    async def _calm(self) -> None:
        """Requests alone, then the server at rest."""
        async with connected(self._settings) as http:
            traffic = Traffic(self._settings, self._server, http, self._started)
            ends = [await traffic.send("stream") for _ in range(_ALONE)]
            self._account(traffic)
        self.seen.alone.append([end.ended - end.sent for end in ends if end.way == ANSWERED])
        await self._rest()
        async with connected(self._settings) as http:
            self.seen.metrics.append(await watch.Server(http, self._settings.target).metrics())
        if self._soak.server_pid is not None:
            await asyncio.sleep(0.5)  # the server's own ends of the connections
            self.seen.idle.append(watch.held(self._soak.server_pid, self.now))

    async def _storm(self) -> None:
        async with connected(self._settings) as http:
            self._traffic = Traffic(self._settings, self._server, http, self._started)
            end = self.now + self._soak.duration_s
            helpers = [asyncio.create_task(self._watch()), asyncio.create_task(self._bursts(self._traffic))]
            if self._soak.kill_every_s is not None:
                helpers.append(asyncio.create_task(self._kills(http, self._soak.kill_every_s)))
            async with asyncio.TaskGroup() as group:
                for _ in range(self._soak.users):
                    group.create_task(self._user(self._traffic, end))
            for helper in helpers:
                helper.cancel()
            # A burst that was begun is waited for: its requests end in a defined way as well.
            results = await asyncio.gather(*helpers, return_exceptions=True)
            await self._recovered(http)
            self._account(self._traffic)
            for result in results:
                if isinstance(result, Exception):
                    raise result

    def _account(self, traffic: Traffic) -> None:
        self.seen.ends += traffic.ends
        self.seen.begun += traffic.begun

    async def _user(self, traffic: Traffic, until: float) -> None:
        while self.now < until:
            end = await traffic.send(traffic.pick())
            if end.way != ANSWERED:
                await asyncio.sleep(0.02)  # a refusal costs nothing: without a pause they would be most of the traffic

    async def _bursts(self, traffic: Traffic) -> None:
        pending: set[asyncio.Task[End]] = set()
        try:
            while True:
                await asyncio.sleep(min(self._soak.burst_every_s, self._soak.duration_s / 3))
                for _ in range(self._soak.burst):
                    pending.add(asyncio.create_task(traffic.send("burst", max_tokens=2)))
        finally:
            await asyncio.gather(*pending)

    async def _kills(self, http: aiohttp.ClientSession, every_s: float) -> None:
        """Kills the engine while requests run, and waits until another one serves."""
        assert self._traffic is not None
        pid = self._soak.server_pid
        assert pid is not None
        while True:
            await asyncio.sleep(every_s)
            engine = watch.engine_of(pid)
            if engine is None:
                continue
            span = [self.now, float("inf")]
            self._traffic.outages.spans.append(span)
            self.seen.kills.append(span)
            os.kill(engine, signal.SIGKILL)
            self._tell(f"{self.now:6.1f} s  engine {engine} killed")
            await asyncio.sleep(_SAMPLE_S)
            await self._recovered(http)

    async def _recovered(self, http: aiohttp.ClientSession) -> None:
        """Until the server is ready, if an engine was killed and is not back yet; for `rest_s` at most."""
        server, deadline = watch.Server(http, self._settings.target), self.now + self._soak.rest_s
        for span in self.seen.kills:
            while span[1] == float("inf") and self.now < deadline:
                if await server.ready():
                    span[1] = self.now + _GRACE_S
                else:
                    await asyncio.sleep(_SAMPLE_S)

    async def _watch(self) -> None:
        """Samples memory, and tells how it goes."""
        assert self._traffic is not None
        told = self.now
        while True:
            await asyncio.sleep(_SAMPLE_S)
            if self._soak.server_pid is not None:
                self.seen.samples.append(watch.held(self._soak.server_pid, self.now))
            if self.now - told >= _TELL_S:
                told = self.now
                rss = f"  {self.seen.samples[-1].rss / 1e6:.0f} MB" if self.seen.samples else ""
                ended = len(self._traffic.ends)
                self._tell(f"{self.now:6.1f} s  begun {self._traffic.begun}  ended {ended}{rss}")

    async def _rest(self) -> float | None:
        """Seconds until the server holds nothing any more by its own gauges; None: it still does after `rest_s`."""
        begin = self.now
        async with connected(self._settings) as http:
            server = watch.Server(http, self._settings.target)
            while self.now - begin < self._soak.rest_s:
                found = watch.gauges(await server.metrics())
                if not any(found.values()):
                    return self.now - begin
                await asyncio.sleep(_SAMPLE_S)
        return None


def median(values: list[float]) -> float:
    """NaN of nothing."""
    return statistics.median(values) if values else float("nan")
