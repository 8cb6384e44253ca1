"""An experiment's way, step by step."""

from dataclasses import replace
from typing import Any

import pytest

from server.config import ConfigError
from server.routing.evidence.metrics import Claim, Finding
from server.routing.evidence.observation import Observation
from server.routing.experiment import Reading, act, start, step, weights
from server.routing.guards import RecentRequests, Window, violation
from server.routing.plan import Guards, Plan, Stage

PLAN = Plan("faster", "candidate", "baseline", primary="tpot", max_time_s=5000.0)


def finding(claim: Claim, estimate: float, metric: str = "tpot") -> Finding:
    return Finding(metric, claim, estimate, estimate - 0.02, estimate + 0.02, 0.005, 500, 500, 20.0)


def test_a_faster_candidate_goes_through_all_stages() -> None:
    state, event = start(PLAN, "salt", 0.0)
    assert event.weights == {"control": 98.0, "baseline": 1.0, "candidate": 1.0}
    shares, now = [], 0.0
    while not state.over:
        now += 200.0
        reading = Reading((finding("better", -0.2),), int(2 * now), int(2 * now))
        state, events = step(PLAN, state, reading, now)
        assert len(events) == 1
        shares.append(events[0].weights["candidate"])
    assert shares == [5.0, 25.0, 50.0, 100.0] and state.status == "promoted" and state.salt == "salt"
    assert step(PLAN, state, Reading((finding("worse", 0.5),)), now) == (state, ())


def test_the_last_stage_may_be_watched() -> None:
    plan = replace(PLAN, stages=(Stage(50, 10, 60.0), Stage(100, 30, 90.0)))
    state, _ = start(plan, "salt", 0.0)
    better = (finding("better", -0.2),)
    state, events = step(plan, state, Reading(better, 40, 40), 60.0)
    assert (state.status, state.stage, events[0].kind) == ("running", 1, "advance")
    assert events[0].weights == {"control": 0.0, "baseline": 0.0, "candidate": 100.0}
    worse = (finding("worse", 0.5),)  # nobody to compare with: what was known is known
    assert step(plan, state, Reading(worse, 69, 40), 200.0) == (state, ())
    assert step(plan, state, Reading(better, 70, 40), 149.0) == (state, ())
    failing = Reading(better, 70, 40, candidate=Window(50, 25))
    assert step(plan, state, failing, 120.0)[0].status == "rolled_back"
    promoted, events = step(plan, state, Reading(better, 70, 40), 150.0)
    assert promoted.status == "promoted" and "tpot" in promoted.reason and events[0].kind == "promote"


def test_a_stage_needs_requests_and_time() -> None:
    state, _ = start(PLAN, "salt", 0.0)
    assert step(PLAN, state, Reading(num_candidate=19, num_baseline=90), 500.0) == (state, ())
    assert step(PLAN, state, Reading(num_candidate=20, num_baseline=20), 119.0) == (state, ())
    after, events = step(PLAN, state, Reading(num_candidate=20, num_baseline=20), 120.0)
    assert (
        after.stage == 1 and events[0].kind == "advance" and (after.stage_candidate, after.stage_started_s) == (20, 120)
    )


def test_an_equal_candidate_is_held_once_before_the_last_stage() -> None:
    state = replace(start(PLAN, "salt", 0.0)[0], stage=3)
    equal = Reading((finding("undecided", 0.0),), 900, 900)
    assert step(PLAN, state, equal, 4999.0) == (state, ())
    held, events = step(PLAN, state, equal, 5000.0)
    assert events[0].kind == "hold" and held.status == "running" and "tpot" in events[0].reason
    assert step(PLAN, held, equal, 6000.0) == (held, ())
    tolerant = replace(PLAN, goal="no_worse", margin=0.03)
    assert step(tolerant, held, equal, 6000.0)[0].status == "promoted"


def test_harm_rolls_back_unless_it_is_tolerated() -> None:
    state = replace(start(PLAN, "salt", 0.0)[0], stage=2)
    after, events = step(PLAN, state, Reading((finding("worse", 0.2),)), 10.0)
    assert after.status == "rolled_back" and weights(PLAN, after) == {"control": 100, "baseline": 0, "candidate": 0}
    assert events[0].reason.startswith("tpot is worse") and events[0].evidence["findings"][0]["estimate"] == 0.2
    assert step(PLAN, state, Reading((finding("worse", 0.021),)), 10.0) == (state, ())


def test_operators_decide_too() -> None:
    state, _ = start(PLAN, "salt", 0.0)
    paused, events = act(PLAN, state, "pause", Reading(), 1.0, "root")
    assert events[0].actor == "root" and step(PLAN, paused, Reading((), 99, 99), 900.0) == (paused, ())
    assert step(PLAN, paused, Reading(restarts=1), 900.0)[0].status == "rolled_back"
    resumed, _ = act(PLAN, paused, "resume", Reading(), 2.0, "root")
    promoted, _ = act(PLAN, resumed, "promote", Reading(), 3.0, "root")
    assert weights(PLAN, promoted)["candidate"] == 100
    assert act(PLAN, promoted, "pause", Reading(), 4.0, "root") == (promoted, ())
    assert act(PLAN, promoted, "roll_back", Reading(), 4.0, "root")[0].status == "rolled_back"


def test_guard_rails() -> None:
    guards, fine = Guards(), Window(100, 0, 50.0, 10.0)
    assert violation(guards, fine, fine, 0) is None
    assert "restarts" in str(violation(guards, fine, fine, 1))
    assert "error rate" in str(violation(guards, Window(20, 5), Window(20, 1), 0))
    assert violation(guards, Window(20, 5), Window(20, 2), 0) is None  # both fail
    assert violation(guards, Window(20, 4), Window(20, 0), 0) is None
    assert "tpot" in str(violation(guards, Window(100, 0, 50.0, 41.0), fine, 0))
    assert violation(guards, Window(49, 0, 50.0, 41.0), fine, 0) is None


def test_recent_requests_are_forgotten() -> None:
    recent = RecentRequests(60.0)
    recent.add([Observation(1, 1.0, error=True), Observation(2, 50.0, ttft_ms=5.0, tpot_ms=2.0)])
    assert recent.window(60.0) == Window(2, 1, 5.0, 2.0) and recent.window(62.0) == Window(1, 0, 5.0, 2.0)


@pytest.mark.parametrize(
    ("field", "value", "message"),
    [
        ("goal", "win", "improve, no_worse"),
        ("primary", "errors", "use one of ttft"),
        ("baseline", "control", "two are the same arm"),
        ("alpha", 0.0, "alpha"),
        ("stages", (Stage(60), Stage(100)), "at most 50"),
        ("tolerances", {"latency": 0.1}, "no metric"),
    ],
)
def test_bad_settings_say_what_is_valid(field: str, value: Any, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        replace(PLAN, **{field: value})
