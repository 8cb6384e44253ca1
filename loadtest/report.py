"""What is printed at the end."""

from __future__ import annotations

from collections.abc import Sequence

from loadtest.asserts import Assertion, Outcome
from loadtest.measure import METRICS, Summary
from loadtest.settings import Settings
from loadtest.sweep import Point, highest, knee, pareto

_RUNS = ("request_throughput", "output_throughput", "median_ttft_ms", "median_itl_ms", "p99_ttft_ms")
"""Figures whose spread over repeated runs is told."""


def lines(settings: Settings, summary: Summary, runs: Sequence[Summary], outcomes: Sequence[Outcome]) -> list[str]:
    """The report as plain lines: counts, rates, latencies with intervals, speculation, warnings, assertions."""
    found = [
        f"{summary.completed} completed, {summary.failed} failed, {summary.cancelled} cancelled "
        f"in {summary.duration:.1f} s"
        + (f"; {summary.slow} slow readers are not in the latencies" if summary.slow else ""),
        *(f"  {count} x {kind}" for kind, count in summary.errors.items()),
        f"requests/s {summary.request_throughput:.2f}   output tokens/s {summary.output_throughput:.1f} "
        f"(peak {summary.max_output_tokens_per_s:.0f})   total tokens/s {summary.total_token_throughput:.1f}   "
        f"at once {summary.max_concurrent_requests}",
    ]
    if summary.request_goodput is not None:
        limits = ", ".join(f"{o.metric} <= {o.limit_ms:g} ms" for o in settings.output.objectives)
        found.append(f"goodput {summary.request_goodput:.2f} requests/s within {limits}")
    found += ["", *_table(settings, summary), ""]
    if summary.speculation is not None:
        spec = summary.speculation
        positions = " ".join(f"{rate:.2f}" for rate in spec.per_position)
        found.append(
            f"speculation: acceptance {spec.acceptance_rate:.3f}, "
            f"{spec.acceptance_length:.2f} tokens a verify step with drafts"
            + (f"; by position {positions}" if positions else "")
        )
    if len(runs) > 1:
        found += _spread(runs, settings.output.percentiles)
    found += [f"warning: {warning}" for warning in summary.warnings]
    return [*found, *outcome_lines(outcomes)]


def outcome_lines(outcomes: Sequence[Outcome]) -> list[str]:
    """A line for each assertion."""
    return [f"{'holds' if o.holds else 'FAILS'}: {o.assertion} ({o.value:.4g})" for o in outcomes]


def sweep_lines(points: Sequence[Point], tests: Sequence[Assertion], unit: str) -> list[str]:
    """A table of the loads, then the highest one that keeps the tests, the knee and the Pareto front."""
    found = aligned(sweep_table(points, unit))
    if tests:
        best, said = highest(points), " and ".join(map(str, tests))
        found.append(f"highest load with {said}: " + (f"{best.load:.4g} {unit}" if best is not None else "none"))
    bend = knee(points)
    if bend is not None:
        found.append(f"knee (most throughput over latency): {bend.load:.4g} {unit}")
    front = ", ".join(f"{point.load:.4g}" for point in pareto(points))
    found.append(f"Pareto front of user speed and throughput, fastest users first: {front} {unit}")
    return found


def sweep_table(points: Sequence[Point], unit: str) -> list[list[str]]:
    """A line for each load, in ascending order."""
    rows = [
        [unit, "done", "failed", "req/s", "tokens/s", "user tokens/s", "ttft p50", "p99", "tpot p50", "p99", "kept"]
    ]
    for point in sorted(points, key=lambda point: point.load):
        of = point.summary
        ttft, tpot = of.samples["ttft"], of.samples["tpot"]
        figures = [of.request_throughput, of.output_throughput, of.user_speed]
        figures += [ttft.percentile(50), ttft.percentile(99), tpot.percentile(50), tpot.percentile(99)]
        counts = [f"{point.load:.4g}", str(of.completed), str(of.failed)]
        rows.append([*counts, *(f"{value:.2f}" for value in figures), "yes" if point.holds else "no"])
    return rows


def _table(settings: Settings, summary: Summary) -> list[str]:
    percentiles = settings.output.percentiles
    head = ["ms", "mean", *(f"p{percent:g}" for percent in percentiles), "95 % interval of the last"]
    rows = [head]
    for name in METRICS:
        of = summary.samples[name]
        if not len(of):
            continue
        interval = summary.intervals[name].get(f"p{percentiles[-1]:g}")
        told = f"{interval.low:.2f} - {interval.high:.2f}" if interval is not None else ""
        rows.append([name, f"{of.mean:.2f}", *(f"{of.percentile(percent):.2f}" for percent in percentiles), told])
    return aligned(rows)


def aligned(rows: Sequence[Sequence[str]]) -> list[str]:
    """Columns of one width each, the first one flush left."""
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    return [
        "  ".join(
            cell.ljust(width) if not column else cell.rjust(width)
            for column, (cell, width) in enumerate(zip(row, widths, strict=True))
        )
        for row in rows
    ]


def _spread(runs: Sequence[Summary], percentiles: Sequence[float]) -> list[str]:
    found = [f"over {len(runs)} runs: median (lowest, highest)"]
    for name in _RUNS:
        values = sorted(run.values({*percentiles, 99.0}).get(name, float("nan")) for run in runs)
        middle = (values[(len(values) - 1) // 2] + values[len(values) // 2]) / 2
        found.append(f"  {name} {middle:.2f} ({values[0]:.2f}, {values[-1]:.2f})")
    return found
