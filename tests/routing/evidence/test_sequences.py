"""The bounds hold at every look, not only at the last."""

import math

import numpy as np
import pytest

from server.routing.evidence.clusters import Clusters, clustered_variance, effective_count, time_blocks
from server.routing.evidence.incidents import Incidents
from server.routing.evidence.quality import read
from server.routing.evidence.sequences import coin_interval, radius


def test_radius_covers_at_every_moment() -> None:
    walks = np.cumsum(np.random.default_rng(0).normal(size=(400, 2000)), axis=1)
    counts = np.arange(1, 2001)
    bounds = np.array([radius(1 / n, 0.1, 0.2, 1e9) for n in counts])
    ever = (np.abs(walks / counts) > bounds)[:, 20:].any(axis=1).mean()
    assert 0.005 < ever < 0.1
    fixed = (np.abs(walks / counts) > 1.645 / np.sqrt(counts))[:, 20:].any(axis=1).mean()
    assert fixed > 0.4  # what a look after each request does to an ordinary interval


def test_radius_knows_nothing_of_nothing() -> None:
    assert radius(0.0, 0.05, 0.1, 50) == math.inf and radius(0.1, 0.05, 0.1, 1) == math.inf
    assert radius(0.01, 0.05, 0.1, 5) > radius(0.01, 0.05, 0.1, 50) > radius(0.001, 0.05, 0.1, 50)


def test_coin_covers_at_every_moment() -> None:
    rng, wrong = np.random.default_rng(1), 0
    for _ in range(150):
        ours = 0
        for count, head in enumerate(rng.random(150) < 0.5, 1):
            ours += int(head)
            low, high = coin_interval(ours, count - ours, 0.1)
            if not low <= 0.5 <= high:
                wrong += 1
                break
    assert wrong / 150 < 0.1
    assert coin_interval(0, 0, 0.05) == (0.0, 1.0)
    assert coin_interval(11, 0, 0.005)[0] < 0.5 < coin_interval(12, 0, 0.005)[0]


def test_an_incident_is_a_key_and_a_block() -> None:
    seen = Incidents()
    for at in (1.0, 2.0, 11.0, 31.0):
        seen.add(candidate=True, key=1, at_s=at)  # one key, again and again
    for key in range(2, 9):
        seen.add(candidate=False, key=key, at_s=12.0)  # a burst
    seen.add(candidate=True, key=9, at_s=22.0)
    seen.add(candidate=False, key=10, at_s=23.0)  # both
    seen.settle(22.0)
    assert (seen.candidate, seen.baseline) == (1, 1)
    seen.settle(60.0)
    assert (seen.candidate, seen.baseline) == (1, 1)
    for key in range(20, 26):
        seen.add(candidate=key < 24, key=key, at_s=61.0)  # more of the one than of the other
    seen.settle(80.0)
    assert (seen.candidate, seen.baseline) == (2, 1)


def test_clustered_requests_are_worth_fewer() -> None:
    rng = np.random.default_rng(2)
    keys = np.repeat(np.arange(50), 20)
    residuals = np.repeat(rng.normal(size=50), 20) / 1000
    cells, blocks = np.arange(1000), np.tile(np.arange(20), 50)
    clustered = clustered_variance(residuals, Clusters(keys, blocks, cells, 20))
    assert clustered > 15 * float(residuals @ residuals)
    assert effective_count(keys, np.ones(1000)) == pytest.approx(50)


def test_time_blocks_grow() -> None:
    for end in (600.0, 7000.0):
        blocks = time_blocks(np.linspace(0.0, end, 5000), 0.0)
        assert 20 <= blocks.max() + 1 <= 40


@pytest.mark.parametrize(
    ("text", "garbled"),
    [
        ("The quick brown fox jumps over the lazy dog while the farmer reads the morning paper in the shade.", False),
        ("def f(x):\n    return [i ** 2 for i in range(x) if i % 3]\n\nprint(f(10), sum(f(20)), max(f(30)))", False),
        ("the the the " * 40, True),
        ("()" * 24, True),
        ("no " * 12, True),
        ("()" * 8, False),
        ("Yes, that is what I meant to say: no.", False),
        ("1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15", False),
        ("ok \ufffd\ufffd\ufffd", True),
        ("hельlo worлd fроm мixed sсripts whiсh nо реrsоn wоuld тype evеr in оne lifе " * 1, True),
        ("", False),
    ],
)
def test_garbled(text: str, garbled: bool) -> None:
    assert read(text).garbled is garbled
