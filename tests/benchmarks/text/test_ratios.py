from __future__ import annotations

import random
import statistics

import pytest

from benchmarks.report import verdict
from benchmarks.text.ratios import Ratio, ratio_of_medians


def test_the_interval_holds_the_true_ratio_about_as_often_as_it_says() -> None:
    rng, held = random.Random(0), 0
    for _ in range(60):
        theirs = [100.0 * rng.lognormvariate(0.0, 0.05) for _ in range(9)]
        ours = [95.0 * rng.lognormvariate(0.0, 0.05) for _ in range(9)]
        found = ratio_of_medians(ours, theirs)
        assert found.low <= found.value <= found.high
        assert found.value == statistics.median(ours) / statistics.median(theirs)
        held += found.low <= 0.95 <= found.high
    assert 50 <= held <= 60


def test_what_all_rounds_share_does_not_widen_it() -> None:
    slow = [1.0, 0.6, 0.9, 1.1, 0.7, 1.3, 0.8]
    found = ratio_of_medians([95.0 * s for s in slow], [100.0 * s for s in slow])
    assert found.low == pytest.approx(0.95) and found.high == pytest.approx(0.95)


@pytest.mark.parametrize(
    ("low", "high", "expected"),
    [
        (0.96, 1.0, "met"),
        (0.95, 1.0, "met"),
        (0.9, 0.94, "missed"),
        (0.94, 0.96, "not shown"),
        (0.9, 1.0, "not shown"),
    ],
)
def test_the_verdict_is_of_the_whole_interval(low: float, high: float, expected: str) -> None:
    assert Ratio((low + high) / 2, low, high).verdict(0.95) == expected


@pytest.mark.parametrize(("ours", "theirs"), [([], []), ([1.0], [1.0, 2.0])])
def test_rounds_come_in_pairs(ours: list[float], theirs: list[float]) -> None:
    with pytest.raises(ValueError, match="rounds"):
        ratio_of_medians(ours, theirs)


def test_the_report_takes_a_rows_own_verdict() -> None:
    target = {"target": 0.95, "better": "higher"}
    assert verdict({"value": 0.97, "verdict": "not shown"}, target) == "not shown"
    assert verdict({"value": 0.97}, target) == "met"
    assert verdict({"value": 0.9}, target) == "missed"
