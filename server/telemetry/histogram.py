"""Prometheus histograms that take weighted observations: one step that emits n tokens is n equal intervals."""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Iterable, Sequence

import numpy as np
from numpy.typing import NDArray
from prometheus_client import Metric
from prometheus_client.core import HistogramMetricFamily


class WeightedHistogram:
    """One series. `observe(value, count)` costs the same for any count, where the client library would need `count`
    calls. Not thread-safe: observed and scraped on the event loop only."""

    def __init__(self, bounds: Sequence[float]) -> None:
        self._bounds = list(bounds)
        self._counts = [0] * (len(bounds) + 1)
        self._sum = 0.0

    def observe(self, value: float, count: int = 1) -> None:
        self._counts[bisect_left(self._bounds, value)] += count
        self._sum += value * count

    def observe_all(self, values: NDArray[np.float64], counts: NDArray[np.float64] | None = None) -> None:
        """`values` [n], each `counts` [n] (whole numbers; once by default) times."""
        index = np.searchsorted(self._bounds, values, side="left")
        for bucket, count in enumerate(np.bincount(index, counts).tolist()):
            self._counts[bucket] += int(count)
        self._sum += float(values.sum() if counts is None else values @ counts)

    def cumulated(self) -> tuple[list[tuple[str, float]], float]:
        """Counts up to each bound, and the sum of all values."""
        buckets: list[tuple[str, float]] = []
        total = 0
        for bound, count in zip([*map(str, self._bounds), "+Inf"], self._counts, strict=True):
            total += count
            buckets.append((bound, total))
        return buckets, self._sum


class HistogramFamily:
    """A histogram with a series for every value of one label.

    `buckets` are rising upper bounds (inclusive) in the metric's unit; +Inf is added.
    """

    def __init__(self, name: str, documentation: str, buckets: Sequence[float], label: str = "arm") -> None:
        if list(buckets) != sorted(set(buckets)):
            raise ValueError(f"{name}: buckets must rise, got {list(buckets)}")
        self.name = name
        self._documentation = documentation
        self._buckets = [float(bound) for bound in buckets]
        self._label = label
        self._series: dict[str, WeightedHistogram] = {}

    def labels(self, value: str) -> WeightedHistogram:
        """The series of that label value; it is shown from now on."""
        return self._series.setdefault(value, WeightedHistogram(self._buckets))

    def collect(self) -> Iterable[Metric]:
        family = HistogramMetricFamily(self.name, self._documentation, labels=[self._label])
        for value, series in self._series.items():
            buckets, total = series.cumulated()
            family.add_metric([value], buckets=buckets, sum_value=total)
        yield family
