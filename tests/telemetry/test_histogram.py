from __future__ import annotations

import numpy as np
import pytest
from prometheus_client import CollectorRegistry, Histogram, generate_latest

from server.telemetry.histogram import HistogramFamily


@pytest.mark.parametrize("at_once", [False, True])
def test_it_equals_the_client_librarys_histogram(at_once: bool) -> None:
    """Values on a bound belong to that bucket; a weight is that many observations."""
    observations = [(0.05, 1), (0.1, 3), (0.5, 2), (1.0, 1), (7.0, 4)]
    ours_registry, theirs_registry = CollectorRegistry(), CollectorRegistry()
    family = HistogramFamily("x_seconds", "Help.", [0.1, 1.0, 5.0])
    ours_registry.register(family)
    ours = family.labels("a")
    theirs = Histogram("x_seconds", "Help.", ["arm"], buckets=[0.1, 1.0, 5.0], registry=theirs_registry).labels("a")
    if at_once:
        ours.observe_all(*map(np.array, zip(*observations, strict=True)))
    for value, count in observations:
        if not at_once:
            ours.observe(value, count)
        for _ in range(count):
            theirs.observe(value)
    expected = [line for line in generate_latest(theirs_registry).decode().splitlines() if "_created" not in line]
    found = generate_latest(ours_registry).decode().splitlines()
    assert [line for line in found if "_sum" not in line] == [line for line in expected if "_sum" not in line]
    sums = [float(line.split()[1]) for line in found + expected if line.startswith("x_seconds_sum")]
    assert sums[0] == pytest.approx(sums[1])


@pytest.mark.parametrize("buckets", [[2.0, 1.0], [1.0, 1.0]])
def test_buckets_must_rise(buckets: list[float]) -> None:
    with pytest.raises(ValueError, match="rise"):
        HistogramFamily("x", "Help.", buckets)
