"""Simulated experiments, a few: benchmarks/ab_simulation.py runs thousands."""

import pytest

from benchmarks.ab.run import simulate
from benchmarks.ab.traffic import Effect, Load
from server.routing.plan import Plan, Stage

PLAN = Plan("simulated", "candidate", "baseline", stages=(Stage(25, 50, 60.0), Stage(50, 50, 60.0), Stage(100)))


def test_equal_arms_get_no_verdict() -> None:
    outcomes = [simulate(PLAN, Load(4, 400), Effect(), 500, seed) for seed in range(200)]
    wrong = [outcome for outcome in outcomes if outcome.verdict != "running"]
    assert len(wrong) <= 10, wrong


@pytest.mark.parametrize(
    ("effect", "verdict"),
    [
        (Effect(slowdown=1.3), "rolled_back"),
        (Effect(errors=0.03), "rolled_back"),
        (Effect(garbled=0.5), "rolled_back"),
        (Effect(slowdown=0.7), "promoted"),
    ],
)
def test_unequal_arms_get_theirs(effect: Effect, verdict: str) -> None:
    outcomes = [simulate(PLAN, Load(20, 2000), effect, 900, seed) for seed in range(4)]
    assert [outcome.verdict for outcome in outcomes].count(verdict) >= 3, outcomes
