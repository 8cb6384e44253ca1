"""`outpace loadtest`: probe, run, measure, report."""

from __future__ import annotations

import argparse
import asyncio
import sys
from collections.abc import Sequence

from loadtest.asserts import Outcome, check
from loadtest.caveats import warnings
from loadtest.errors import LoadTestError
from loadtest.export import aiperf_result, vllm_result, write_csv, write_json
from loadtest.html import page
from loadtest.live import Live
from loadtest.measure import Seen, Summary, measure
from loadtest.options import parse_settings
from loadtest.plan import Server, session_source, start_times
from loadtest.probe import probe
from loadtest.processes import run_processes
from loadtest.report import lines
from loadtest.scrape import scrape
from loadtest.settings import Settings


def run_loadtest(options: argparse.Namespace) -> int:
    """Exit status: 0, 1 if an assertion fails or no request ends well, 2 for a wrong command line or target."""
    try:
        settings = parse_settings(options)
        server = prepare(settings)
    except LoadTestError as error:
        print(f"outpace loadtest: {error}", file=sys.stderr)
        return 2
    seen = [run_once(settings, server, settings.seed + number) for number in range(settings.repeats)]
    output = settings.output
    runs = [measure([one], output.objectives, output.percentiles) for one in seen]
    summary = measure(seen, output.objectives, output.percentiles) if len(seen) > 1 else runs[0]
    limited = settings.load.max_concurrency is not None
    summary.warnings.extend(warnings(seen, server.way, limited))
    outcomes = check(output.asserts, summary.values(output.percentiles))
    report = lines(settings, summary, runs, outcomes)
    print("\n".join(["", *report]))
    _write(settings, server, summary, runs, seen, outcomes)
    return 0 if all(outcome.holds for outcome in outcomes) and summary.completed else 1


def prepare(settings: Settings) -> Server:
    """Reads the workload and asks the target what must be known. Raises LoadTestError before anything is measured."""
    server = asyncio.run(probe(settings))
    next(session_source(settings.asked, server.scale, settings.seed))
    start_times(settings.load, settings.asked, server.scale, settings.seed)
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


def _write(
    settings: Settings,
    server: Server,
    summary: Summary,
    runs: Sequence[Summary],
    seen: Sequence[Seen],
    outcomes: Sequence[Outcome],
) -> None:
    output = settings.output
    if output.json is not None:
        write_json(output.json, vllm_result(settings, server, summary, runs, seen, outcomes))
    if output.aiperf_json is not None:
        write_json(output.aiperf_json, aiperf_result(settings, summary, seen))
    if output.csv is not None:
        with output.csv.open("w", newline="", encoding="utf-8") as file:
            write_csv(file, seen)
    if output.html is not None:
        output.html.write_text(page(settings, server, summary, seen, outcomes), encoding="utf-8")
