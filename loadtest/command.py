"""`outpace loadtest`: runs what was asked for, prints it and writes it to files."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence

from loadtest.asserts import check
from loadtest.command_compare import run_comparison
from loadtest.command_sweep import run_sweep
from loadtest.errors import LoadTestError
from loadtest.export import aiperf_result, vllm_result, write_json, write_requests
from loadtest.facts import facts
from loadtest.html import Report, write_page
from loadtest.parse import settings_of, soak_of
from loadtest.report import lines
from loadtest.runs import prepare, run_all
from loadtest.settings import Settings
from loadtest.soak.command import run_soak


def run_loadtest(options: argparse.Namespace) -> int:
    """Exit status: 0, 1 if an assertion fails or no request ends well, 2 for a wrong command line or target."""
    try:
        settings = settings_of(options)
        if options.soak:
            return run_soak(settings, soak_of(options))
        if settings.modes.two_sided:
            return run_comparison(settings)
        if settings.modes.loads or settings.modes.tests:
            return run_sweep(settings)
        return run_plain(settings)
    except LoadTestError as error:
        print(f"outpace loadtest: {error}", file=sys.stderr)
        return 2


def run_plain(settings: Settings) -> int:
    """One load, `repeats` times."""
    measured = run_all(settings, prepare(settings))
    output = settings.output
    outcomes = check(output.asserts, measured.summary.values(output.percentiles))
    say(["", *lines(settings, measured.summary, measured.runs, outcomes)])
    if output.json is not None:
        write_json(output.json, vllm_result(measured, outcomes))
    if output.aiperf_json is not None:
        write_json(output.aiperf_json, aiperf_result(measured))
    if output.csv is not None:
        write_requests(output.csv, [("", measured.seen)])
    if output.html is not None:
        title, told = f"Load test of {measured.server.model}", facts(settings, measured.server)
        report = Report(title, told, {"": measured.summary}, output.percentiles, measured.seen, outcomes)
        write_page(output.html, report)
    return 0 if all(outcome.holds for outcome in outcomes) and measured.good else 1


def say(told: Sequence[str]) -> None:
    """Lines on the terminal, at once."""
    print("\n".join(told), flush=True)
