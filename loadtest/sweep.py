"""Several loads: a list of them, or a search for the highest one that keeps a latency target."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from loadtest.asserts import Assertion, check
from loadtest.measure import Summary

_MOST_DOUBLINGS = 24


@dataclass(frozen=True)
class Point:
    """One load and what was measured at it; `holds`: whether all tests did (true where there are none)."""

    load: float
    summary: Summary
    holds: bool = True


def holds(summary: Summary, tests: Sequence[Assertion], percentiles: Sequence[float]) -> bool:
    """Whether a run kept every test; one with an error or without an answer keeps none."""
    if not summary.completed or summary.failed:
        return False
    return all(outcome.holds for outcome in check(tests, summary.values(percentiles)))


def find_highest(measure: Callable[[float], Point], start: float, precision: float, whole: bool = False) -> list[Point]:
    """Every load that was tried, in that order: doubling (or halving) from `start` until kept and failed loads are
    known.

    Then bisection, until the two are within `precision` of each other (relative), or next to each other if
    loads are `whole`. `highest` of the points is the answer; there is none where even loads far below `start` fail.
    """
    points: list[Point] = []

    def attempt(load: float) -> bool:
        points.append(measure(load))
        return points[-1].holds

    kept, failed = _bracket(attempt, start, whole)
    while kept is not None and failed is not None and not _close(kept, failed, precision, whole):
        # In the middle of the logarithms: the precision is relative.
        load = float(math.floor(math.sqrt(kept * failed) + 0.5)) if whole else math.sqrt(kept * failed)
        if whole:
            load = min(max(load, kept + 1), failed - 1)
        if attempt(load):
            kept = load
        else:
            failed = load
    return points


def _close(kept: float, failed: float, precision: float, whole: bool) -> bool:
    return failed - kept <= max(precision * failed, 1.0 if whole else 0.0)


def _bracket(attempt: Callable[[float], bool], start: float, whole: bool) -> tuple[float | None, float | None]:
    """A load that keeps the tests and a higher one that does not."""
    if attempt(start):
        load = start
        for _ in range(_MOST_DOUBLINGS):
            if not attempt(load * 2):
                return load, load * 2
            load *= 2
        return load, None
    load = start
    for _ in range(_MOST_DOUBLINGS):
        if whole and load <= 1:
            return None, load
        lower = float(max(1, int(load // 2))) if whole else load / 2
        if attempt(lower):
            return lower, load
        load = lower
        if load < start / 1024:
            break
    return None, load


def highest(points: Sequence[Point]) -> Point | None:
    """The highest load that kept the tests and lies below every one that did not."""
    failed = min((point.load for point in points if not point.holds), default=math.inf)
    kept = [point for point in points if point.holds and point.load < failed]
    return max(kept, key=lambda point: point.load, default=None)


def knee(points: Sequence[Point]) -> Point | None:
    """The load of most power: throughput over latency (Kleinrock, "Power and deterministic rules of thumb", 1979).

    Beyond it latency grows faster than throughput. None without three loads, or where the most power is at an end, so
    that
    the knee lies outside of what was measured.
    """
    ordered = sorted((point for point in points if point.summary.completed), key=lambda point: point.load)
    if len(ordered) < 3:
        return None
    power = [point.summary.output_throughput / point.summary.samples["e2el"].percentile(50) for point in ordered]
    place = power.index(max(power))
    return ordered[place] if 0 < place < len(ordered) - 1 else None


def pareto(points: Sequence[Point]) -> list[Point]:
    """Loads at which no other one gives both more throughput and more speed to a user; fastest users first."""
    found: list[Point] = []
    most = -math.inf
    for point in sorted(points, key=lambda point: (-point.summary.user_speed, -point.summary.output_throughput)):
        if point.summary.output_throughput > most:
            most = point.summary.output_throughput
            found.append(point)
    return found
