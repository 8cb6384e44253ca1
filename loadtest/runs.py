"""One measured run, and several of them taken together."""

from __future__ import annotations

import asyncio
import sys
from collections.abc import Sequence
from dataclasses import dataclass, replace

from loadtest.caveats import warnings
from loadtest.errors import LoadTestError
from loadtest.live import Live
from loadtest.measure import Seen, Summary, measure
from loadtest.plan import Server, session_source, start_times
from loadtest.probe import probe
from loadtest.processes import run_processes
from loadtest.scrape import scrape
from loadtest.settings import Settings


@dataclass(frozen=True)
class Measured:
    """A load test's runs: what each saw, each one's figures, and those of all."""

    settings: Settings
    server: Server
    seen: Sequence[Seen]
    runs: Sequence[Summary]
    summary: Summary

    @property
    def good(self) -> bool:
        """Whether any request ended well."""
        return self.summary.completed > 0


def prepare(settings: Settings) -> Server:
    """Reads the workload and asks the target what must be known. Raises LoadTestError before anything is measured."""
    server = asyncio.run(probe(settings))
    next(session_source(settings.asked, server.scale, settings.seed))
    if not start_times(settings.load, settings.asked, server.scale, settings.seed):
        raise LoadTestError("rate: no request would be sent; use a longer --duration-s or a higher --rate")
    return server


def run_once(settings: Settings, server: Server, seed: int) -> Seen:
    """One run, with the server's counters before and after."""
    in_place = sys.stdout.isatty() if settings.output.live is None else settings.output.live
    live = Live(sys.stdout, in_place)
    before = asyncio.run(scrape(settings))
    run = run_processes(settings, server, seed, live.take)
    live.end()
    after = asyncio.run(scrape(settings))
    counted = after.since(before) if before is not None and after is not None else None
    return Seen(run.records, run.health, settings.warmup_s, counted)


def run_all(settings: Settings, server: Server) -> Measured:
    """All repeats, each with a seed of its own."""
    return taken(settings, server, [run_once(settings, server, settings.seed + n) for n in range(settings.repeats)])


def taken(settings: Settings, server: Server, seen: Sequence[Seen]) -> Measured:
    """Figures of runs that are over, with what a reader must know of them."""
    output = settings.output
    runs = [measure([one], output.objectives, output.percentiles) for one in seen]
    summary = measure(seen, output.objectives, output.percentiles) if len(seen) > 1 else runs[0]
    limited = settings.load.max_concurrency is not None
    told = [*summary.warnings, *warnings(seen, server.way, limited)]
    return Measured(settings, server, seen, runs, replace(summary, warnings=told))


def at_load(settings: Settings, load: float) -> Settings:
    """The same test at another rate or, in a closed loop, concurrency."""
    if settings.load.concurrency is not None:
        users = round(load)
        own = min(settings.processes, users)  # a process without a user would have nothing to do
        return replace(settings, load=replace(settings.load, concurrency=users), processes=own)
    return replace(settings, load=replace(settings.load, rate=load))
