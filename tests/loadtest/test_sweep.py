"""The search for the highest load, the knee and the Pareto front, on queues whose answer is known."""

from __future__ import annotations

from dataclasses import replace

import pytest

from loadtest.asserts import parse_assertion
from loadtest.measure import Seen, Summary, measure
from loadtest.record import Record
from loadtest.sweep import Point, find_highest, highest, holds, knee, pareto

PERCENTILES = (50.0, 95.0, 99.0)


def summary(ttft_s: float, tpot_s: float, count: int = 20, per_s: float = 10.0) -> Summary:
    """Answers of two tokens of one latency, `per_s` of them a second."""
    records = [
        Record(n / per_s, n / per_s, at + tpot_s, [at, at + tpot_s], [1, 1], output_tokens=2, session=n)
        for n in range(count)
        for at in (n / per_s + ttft_s,)
    ]
    return measure([Seen(records)], (), PERCENTILES)


def queue(load: float, capacity: float = 37.0) -> Point:
    """A queue whose waiting grows towards its capacity and has no end beyond."""
    wait = 0.01 / max(1 - load / capacity, 1e-3)
    return Point(load, summary(wait, 0.01), wait < 0.1)  # kept below 90 % of the capacity: 33.3


@pytest.mark.parametrize("start", [1.0, 20.0, 33.0, 500.0])
def test_the_search_ends_within_its_precision_below_the_limit(start: float) -> None:
    points = find_highest(queue, start, 0.02)
    best = highest(points)
    assert best is not None
    assert 33.3 * 0.98 <= best.load <= 33.3
    assert len(points) < 25


@pytest.mark.parametrize("start", [1, 8, 64])
def test_users_are_whole(start: int) -> None:
    points = find_highest(queue, float(start), 0.001, whole=True)
    best = highest(points)
    assert best is not None
    assert best.load == 33
    assert all(point.load == int(point.load) for point in points)


def test_a_server_that_keeps_nothing_has_no_highest_load() -> None:
    assert highest(find_highest(lambda load: replace(queue(load), holds=False), 4.0, 0.1)) is None
    assert highest(find_highest(lambda load: replace(queue(load), holds=False), 4.0, 0.1, whole=True)) is None


def test_a_kept_load_above_a_failed_one_is_luck() -> None:
    points = [replace(queue(load), holds=kept) for load, kept in ((1.0, True), (2.0, False), (4.0, True))]
    best = highest(points)
    assert best is not None
    assert best.load == 1.0


def test_the_knee_has_the_most_throughput_over_latency() -> None:
    latencies = {1.0: 0.1, 2.0: 0.11, 4.0: 0.13, 8.0: 0.5, 16.0: 2.0}
    points = [Point(load, summary(latency, 0.01, per_s=load)) for load, latency in latencies.items()]
    found = knee(points)
    assert found is not None
    assert found.load == 4.0
    assert knee(points[:3]) is None  # power still rises: the knee is beyond
    assert knee(points[:2]) is None


def test_the_pareto_front_leaves_out_what_is_worse_in_both() -> None:
    points = [
        Point(1.0, summary(0.1, 0.010, per_s=1)),
        Point(2.0, summary(0.1, 0.020, per_s=10)),
        Point(3.0, summary(0.1, 0.030, per_s=5)),  # slower for users, and less of it
        Point(4.0, summary(0.1, 0.040, per_s=20)),
    ]
    assert [point.load for point in pareto(points)] == [1.0, 2.0, 4.0]


def test_an_error_keeps_no_test() -> None:
    tests = [parse_assertion("p95_ttft_ms<200")]
    good = summary(0.1, 0.01)
    assert holds(good, tests, PERCENTILES)
    assert not holds(replace(good, failed=1), tests, PERCENTILES)
    assert not holds(replace(good, completed=0), tests, PERCENTILES)
    assert not holds(summary(0.3, 0.01), tests, PERCENTILES)
