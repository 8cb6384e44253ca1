from __future__ import annotations

import random
from itertools import pairwise

import pytest

from server.spec.acceptance import AcceptanceTracker


def converged(*rounds: tuple[int, int], repeat: int = 500) -> AcceptanceTracker:
    tracker = AcceptanceTracker(window=10_000, prior_strength=0.01)
    for _ in range(repeat):
        for num_drafted, num_accepted in rounds:
            tracker.update("c", num_drafted, num_accepted)
    return tracker


def test_an_unknown_class_has_the_prior() -> None:
    assert AcceptanceTracker(prior=0.5).survival("new", 3) == [0.5, 0.25, 0.125]


def test_a_class_may_have_a_prior_of_its_own_for_its_first_position() -> None:
    tracker = AcceptanceTracker(prior=0.5, priors={"short": 0.2})
    assert tracker.survival("short", 2) == [0.2, 0.1]
    assert tracker.survival("other", 1) == [0.5]
    with pytest.raises(ValueError, match=r"short: 1\.5"):
        AcceptanceTracker(priors={"short": 1.5})


def test_positions_are_conditional_on_the_one_before() -> None:
    tracker = converged((3, 0), (3, 1), (3, 2), (3, 3))
    assert tracker.conditional("c", 0) == pytest.approx(3 / 4, abs=0.01)
    assert tracker.conditional("c", 1) == pytest.approx(2 / 3, abs=0.01)
    assert tracker.conditional("c", 2) == pytest.approx(1 / 2, abs=0.01)
    assert tracker.survival("c", 3) == pytest.approx([3 / 4, 2 / 4, 1 / 4], abs=0.01)


def test_positions_not_drafted_are_no_rejections() -> None:
    tracker = converged((1, 1), (2, 2))
    assert tracker.survival("c", 2) == pytest.approx([1.0, 1.0], abs=0.01)


def test_no_drafts_say_nothing_and_the_bonus_token_is_no_draft() -> None:
    tracker = AcceptanceTracker()
    tracker.update("c", 0, 0)
    assert tracker.classes() == []
    with pytest.raises(ValueError, match="num_accepted: 2"):
        tracker.update("c", 1, 2)


def test_classes_do_not_mix() -> None:
    tracker = AcceptanceTracker()
    for _ in range(50):
        tracker.update("good", 1, 1)
        tracker.update("bad", 1, 0)
    assert tracker.survival("good", 1)[0] > 0.9
    assert tracker.survival("bad", 1)[0] < 0.1
    assert sorted(tracker.classes()) == ["bad", "good"]


def test_the_window_forgets() -> None:
    tracker = AcceptanceTracker(window=20)
    for _ in range(1000):
        tracker.update("c", 1, 1)
    for _ in range(40):
        tracker.update("c", 1, 0)
    assert tracker.survival("c", 1)[0] < 0.2


def test_survival_never_rises_and_follows_updates() -> None:
    rng = random.Random(1)
    tracker = AcceptanceTracker()
    for _ in range(300):
        num_drafted = rng.randrange(8)
        tracker.update("c", num_drafted, rng.randrange(num_drafted + 1))
        survival = tracker.survival("c", 10)
        assert all(1.0 >= a >= b >= 0.0 for a, b in pairwise(survival))
        assert tracker.survival("c", 4) == survival[:4]


def test_deeper_positions_start_from_the_one_before_but_not_below_the_prior() -> None:
    tracker = AcceptanceTracker(prior=0.5)
    for _ in range(200):
        tracker.update("sure", 1, 1)
        tracker.update("rare", 1, 0)
    assert tracker.conditional("sure", 1) > 0.95
    assert tracker.conditional("rare", 1) == pytest.approx(0.5)


def test_positions_that_are_no_longer_drafted_drift_back_to_the_prior() -> None:
    tracker = AcceptanceTracker(window=16)
    for _ in range(100):
        tracker.update("c", 2, 1)
    assert tracker.conditional("c", 1) < 0.15
    for _ in range(1000):
        tracker.update("c", 1, 1)
    assert tracker.conditional("c", 1) > 0.9


def test_a_bad_prior_is_refused() -> None:
    with pytest.raises(ValueError, match="prior: 2"):
        AcceptanceTracker(prior=2.0)
