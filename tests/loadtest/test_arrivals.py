from __future__ import annotations

from itertools import islice

import numpy as np
import pytest

from loadtest.arrivals import at_rate, closed_loop, open_loop, replay, unit_times
from loadtest.errors import LoadTestError


@pytest.mark.parametrize(
    ("process", "burstiness", "variation"), [("poisson", 1.0, 1.0), ("constant", 1.0, 0.0), ("gamma", 0.25, 2.0)]
)
def test_gaps_have_the_mean_and_the_variation_of_their_process(
    process: str, burstiness: float, variation: float
) -> None:
    gaps = np.diff(list(islice(unit_times(process, burstiness, 3), 40_000)))
    assert gaps.mean() == pytest.approx(1.0, abs=0.05)
    assert gaps.std() / gaps.mean() == pytest.approx(variation, abs=0.08)


def test_a_rate_scales_time_and_a_seed_repeats_it() -> None:
    times = open_loop(50.0, 1, count=5000)
    assert len(times) == 5000
    assert times[-1] == pytest.approx(100, rel=0.05)
    assert times == open_loop(50.0, 1, count=5000)
    assert times != open_loop(50.0, 2, count=5000)
    assert max(open_loop(50.0, 1, duration_s=10.0)) < 10


def test_a_ramp_has_the_rate_of_its_moment() -> None:
    times = np.asarray(open_loop(10.0, 0, process="constant", duration_s=30.0, ramp_to=50.0, ramp_s=20.0))
    assert np.sum(times < 20) == pytest.approx(600, abs=2)  # 30 a second on average
    assert np.sum((times >= 9) & (times < 11)) == pytest.approx(60, abs=2)
    assert np.sum(times >= 20) == pytest.approx(500, abs=2)
    assert at_rate(5.0, 10.0, 10.0, 0.0) == 0.5


def test_an_infinite_rate_sends_all_at_once() -> None:
    assert open_loop(float("inf"), 0, count=3) == [0.0, 0.0, 0.0]


def test_a_replay_begins_at_once_and_can_be_faster() -> None:
    assert replay([100.0, 101.0, 105.0], speed=2.0) == [0.0, 0.5, 2.5]
    with pytest.raises(LoadTestError, match="never go back"):
        replay([2.0, 1.0])


def test_users_of_a_closed_loop_begin_within_the_ramp() -> None:
    assert closed_loop(4, 2.0) == [0.0, 0.5, 1.0, 1.5]
    with pytest.raises(LoadTestError, match="concurrency"):
        closed_loop(0)


@pytest.mark.parametrize(
    "wrong", [{"rate": 0.0}, {"process": "uniform"}, {"burstiness": 0.0}, {"count": None}, {"ramp_to": -1.0}]
)
def test_what_makes_no_sense_is_named(wrong: dict[str, object]) -> None:
    fields: dict[str, object] = {"rate": 1.0, "seed": 0, "count": 3, **wrong}
    with pytest.raises(LoadTestError, match="is not valid; use"):
        open_loop(**fields)  # type: ignore[arg-type]
