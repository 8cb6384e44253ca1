"""Several loads one after another: given ones, or those of a search."""

from __future__ import annotations

from loadtest.asserts import Outcome, check
from loadtest.export import vllm_result, write_json, write_requests
from loadtest.facts import arrivals, facts
from loadtest.html import Report, write_page
from loadtest.report import outcome_lines, sweep_lines, sweep_table
from loadtest.runs import Measured, at_load, prepare, run_all
from loadtest.settings import Settings
from loadtest.sweep import Point, find_highest, highest, holds


def run_sweep(settings: Settings) -> int:
    """Exit status: 0; 1 if an assertion on the highest load fails, or no load keeps the tests of a search."""
    modes, closed = settings.modes, settings.load.concurrency is not None
    start = settings.load.concurrency if closed else settings.load.rate
    assert start is not None
    server = prepare(settings)
    done: list[Measured] = []

    def measure_at(load: float) -> Point:
        of = at_load(settings, load)
        print(f"--- {arrivals(of.load)}", flush=True)
        done.append(run_all(of, server))
        kept = holds(done[-1].summary, modes.tests, settings.output.percentiles)
        return Point(load, done[-1].summary, kept)

    if modes.loads:
        points = [measure_at(load) for load in modes.loads]
    else:
        points = find_highest(measure_at, float(start), modes.precision, whole=closed)
    best = highest(points) if modes.tests else max(points, key=lambda point: point.load)
    shown = points[0] if best is None else best
    outcomes = check(settings.output.asserts, shown.summary.values(settings.output.percentiles))
    _report(settings, points, done, shown, best if modes.tests else None, outcomes)
    return 0 if best is not None and all(outcome.holds for outcome in outcomes) else 1


def _report(
    settings: Settings,
    points: list[Point],
    done: list[Measured],
    shown: Point,
    best: Point | None,
    outcomes: list[Outcome],
) -> None:
    unit, output = ("users" if settings.load.concurrency is not None else "requests/s"), settings.output
    told = sweep_lines(points, settings.modes.tests, unit)
    print("\n".join(["", *told, *outcome_lines(outcomes)]), flush=True)
    if output.json is not None:
        loads = [vllm_result(one, ()) for one in done]
        best_load = best.load if best is not None else None
        write_json(output.json, {"unit": unit, "highest": best_load, "loads": loads})
    if output.csv is not None:
        write_requests(output.csv, [(f"{point.load:g}", one.seen) for point, one in zip(points, done, strict=True)])
    if output.html is not None:
        of = done[points.index(shown)]
        report = Report(
            f"Load sweep of {of.server.model}",
            facts(of.settings, of.server),
            {f"{shown.load:g} {unit}": shown.summary},
            output.percentiles,
            of.seen,
            outcomes,
            [(point.load, point.summary) for point in points],
            unit,
            findings=[line for line in told if ": " in line],
            tables=[sweep_table(points, unit)],
        )
        write_page(output.html, report)
