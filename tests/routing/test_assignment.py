"""Stickiness: one key, one arm; weights are shares; few keys move when weights do."""

from __future__ import annotations

import subprocess
import sys
from collections import Counter
from collections.abc import Mapping

import pytest

from server.routing.assignment import Assignment

KEYS = [f"user-{number}" for number in range(100_000)]


def split(weights: Mapping[str, float], salt: str = "s") -> list[str]:
    return list(map(Assignment(weights, salt), KEYS))


def shares(arms: list[str]) -> dict[str, float]:
    return {name: count / len(arms) for name, count in Counter(arms).items()}


@pytest.mark.parametrize(
    "weights",
    [{"a": 50, "b": 50}, {"control": 98, "baseline": 1, "candidate": 1}, {"a": 0.3, "b": 0.2, "c": 0.4, "d": 0.1}],
)
def test_weights_are_shares(weights: dict[str, float]) -> None:
    found = shares(split(weights))
    total = sum(weights.values())
    for name, weight in weights.items():
        assert found[name] == pytest.approx(weight / total, abs=0.005)


@pytest.mark.parametrize(
    ("before", "after", "moving"),
    [
        ({"control": 98, "baseline": 1, "candidate": 1}, {"control": 90, "baseline": 5, "candidate": 5}, 0.08),
        ({"control": 50, "candidate": 50}, {"control": 0, "candidate": 100}, 0.5),
        ({"control": 99, "candidate": 1}, {"control": 100, "candidate": 0}, 0.01),
        ({"a": 40, "b": 60}, {"a": 40, "b": 60}, 0.0),
    ],
)
def test_as_many_keys_move_as_weight_does(before: dict[str, float], after: dict[str, float], moving: float) -> None:
    pairs = list(zip(split(before), split(after), strict=True))
    moved = [(a, b) for a, b in pairs if a != b]
    assert len(moved) / len(KEYS) == pytest.approx(moving, abs=0.005)
    rising = {name for name in after if after[name] > before[name]}
    assert {b for _, b in moved} <= rising, "keys move to arms whose weight rose only"


def test_another_salt_is_another_split() -> None:
    one, two = split({"a": 1, "b": 1}, "one"), split({"a": 1, "b": 1}, "two")
    assert sum(x == y for x, y in zip(one, two, strict=True)) / len(KEYS) == pytest.approx(0.5, abs=0.01)


def test_names_do_not_run_into_each_other() -> None:
    """Salt `a` with arm `bc` is not salt `ab` with arm `c`."""
    one = [Assignment({"bc": 1, "x": 1}, "a")(key) == "bc" for key in KEYS[:2000]]
    two = [Assignment({"c": 1, "x": 1}, "ab")(key) == "c" for key in KEYS[:2000]]
    assert one != two


def test_another_process_says_the_same() -> None:
    code = (
        "from server.routing.assignment import Assignment\n"
        "a = Assignment({'b': 30.0, 'a': 70.0}, 'salt')\n"
        "print(''.join(a(f'user-{n}') for n in range(500)))"
    )
    told = subprocess.run(
        [sys.executable, "-c", code],
        capture_output=True,
        text=True,
        check=True,
        env={"PYTHONHASHSEED": "7", "PYTHONPATH": "."},
    )
    assert told.stdout.strip() == "".join(map(Assignment({"a": 70.0, "b": 30.0}, "salt"), KEYS[:500]))


def test_a_known_key_stays_where_it_is() -> None:
    """The function itself is part of the promise: another version must not move anybody."""
    a = Assignment({"control": 90, "candidate": 10}, "2026")
    assert [a(key) for key in ("alice", "bob", "carol", "", "日本")] == EXPECTED


EXPECTED = ["control", "control", "candidate", "control", "control"]


def test_a_single_arm_gets_all() -> None:
    assert set(split({"a": 3.0, "b": 0.0})) == {"a"}


@pytest.mark.parametrize("weights", [{"a": -1.0}, {"a": float("nan")}, {"a": float("inf")}, {"a": 0.0}, {}])
def test_wrong_weights(weights: dict[str, float]) -> None:
    with pytest.raises(ValueError, match="weight"):
        Assignment(weights)
