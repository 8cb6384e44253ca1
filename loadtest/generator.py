"""One process's part of the load: begins sessions when it is their time, and watches itself while it does."""

from __future__ import annotations

import asyncio
import itertools
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field

import aiohttp

from loadtest.client import Client
from loadtest.plan import Bodies, Job
from loadtest.record import OK, Record
from loadtest.workload import Session

PROGRESS_S = 0.5
_LAG_S = 0.01


@dataclass(slots=True)
class Progress:
    """What has happened since the run began; latencies in seconds, of what ended since the progress before."""

    at: float = 0.0
    sent: int = 0
    ended: int = 0
    tokens: int = 0
    errors: Counter[str] = field(default_factory=Counter)
    ttfts: list[float] = field(default_factory=list)
    itls: list[float] = field(default_factory=list)


@dataclass(slots=True)
class Health:
    """How the generator itself fared: how late the event loop woke, seconds; and the share of one core it took."""

    lags: list[float] = field(default_factory=list)
    cpu_share: float = 0.0


class Generator:
    """Runs a job from `start` on `time.monotonic`, which all processes share; `tell` gets a Progress now and then."""

    def __init__(self, job: Job, start: float, http: aiohttp.ClientSession, tell: Callable[[Progress], None]) -> None:
        settings = job.settings
        self._job, self._load, self._tell = job, settings.load, tell
        self._bodies = Bodies(settings.target, settings.asked, job.server, job.seed)
        self._client = Client(http, self._bodies.url, job.server.way, settings.target.timeout_s, start)
        self._progress = Progress()
        limit = settings.load.max_concurrency
        # Processes share the limit as evenly as it goes.
        own = None if limit is None else max(1, (limit + settings.processes - 1 - job.share) // settings.processes)
        self._slots = None if own is None else asyncio.Semaphore(own)
        self.records: list[Record] = []
        self.health = Health()

    async def run(self) -> None:
        """Until all that was begun has ended."""
        cpu, wall = time.process_time(), time.monotonic()
        watch = asyncio.create_task(self._watch())
        try:
            await (self._closed() if self._load.concurrency is not None else self._open())
        finally:
            watch.cancel()
            self.health.cpu_share = (time.process_time() - cpu) / max(time.monotonic() - wall, 1e-9)
            self._report()

    # -- arrivals ------------------------------------------------------------------------------------------------

    async def _open(self) -> None:
        async with asyncio.TaskGroup() as group:
            for at, (number, session) in zip(self._job.times, self._job.sessions, strict=False):
                # Also where it is late already: what was begun must have its turn.
                await asyncio.sleep(max(0.0, at - self._client.now()))
                group.create_task(self._session(number, session, at))

    async def _closed(self) -> None:
        settings = self._job.settings
        left = None if self._load.requests is None else itertools.count(self._job.share, settings.processes)
        sessions = self._job.sessions

        async def user(start: float) -> None:
            await asyncio.sleep(max(0.0, start - self._client.now()))
            at = start
            while self._load.duration_s is None or at < self._load.duration_s:
                if left is not None and next(left) >= (self._load.requests or 0):
                    return
                await self._session(*next(sessions), at)
                at = self._client.now()

        async with asyncio.TaskGroup() as group:
            for start in self._job.times:
                group.create_task(user(start))

    async def _session(self, number: int, session: Session, at: float) -> None:
        """All turns of one session; it ends early where a turn did not end well."""
        history: list[dict[str, object]] = []
        for turn_number, turn in enumerate(session.turns):
            if turn_number and turn.delay_s:
                at += turn.delay_s
                await asyncio.sleep(max(0.0, at - self._client.now()))
            history = list(turn.messages) if turn.whole else [*history, *turn.messages]
            more = turn_number + 1 < len(session.turns)
            body = self._bodies.body(number, turn_number, turn, history)
            behaviour = self._bodies.behaviour(number, turn_number, body.get("max_tokens"))
            record = Record(at, session=number, turn=turn_number)
            self._progress.sent += 1
            if self._slots is None:
                text = await self._client.ask(body, record, behaviour, keep_text=more)
            else:
                async with self._slots:
                    text = await self._client.ask(body, record, behaviour, keep_text=more)
            self._note(record)
            if record.end != OK:
                return
            history = [*history, {"role": "assistant", "content": text}]
            at = self._client.now()

    # -- what is said meanwhile ----------------------------------------------------------------------------------

    def _note(self, record: Record) -> None:
        self.records.append(record)
        progress = self._progress
        progress.ended += 1
        progress.tokens += record.output_tokens
        if record.failed:
            progress.errors[record.end] += 1
        elif record.times and not record.slow:
            progress.ttfts.append(record.times[0] - record.intended)
            tokens = sum(record.tokens[1:])
            if tokens:
                progress.itls.append((record.times[-1] - record.times[0]) / tokens)

    def _report(self) -> None:
        self._progress.at = self._client.now()
        self._tell(self._progress)
        self._progress.ttfts, self._progress.itls = [], []

    async def _watch(self) -> None:
        due = next_report = time.monotonic()
        while True:
            due = max(due, time.monotonic()) + _LAG_S
            await asyncio.sleep(due - time.monotonic())
            self.health.lags.append(max(0.0, time.monotonic() - due))
            if due >= next_report:
                next_report = due + PROGRESS_S
                self._report()
