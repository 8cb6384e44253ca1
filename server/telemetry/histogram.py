"""A Prometheus histogram that takes weighted observations: one step that emits n tokens is n equal intervals."""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Iterable, Sequence

from prometheus_client import Metric
from prometheus_client.core import HistogramMetricFamily


class WeightedHistogram:
    """`observe(value, count)` costs the same for any count, where the client library would need `count` calls.

    `buckets` are rising upper bounds (inclusive) in the metric's unit; +Inf is added. Not thread-safe: observed and
    scraped on the event loop only.
    """

    def __init__(self, name: str, documentation: str, buckets: Sequence[float]) -> None:
        if list(buckets) != sorted(set(buckets)):
            raise ValueError(f"{name}: buckets must rise, got {list(buckets)}")
        self.name = name
        self._documentation = documentation
        self._bounds = list(buckets)
        self._counts = [0] * (len(buckets) + 1)
        self._sum = 0.0

    def observe(self, value: float, count: int = 1) -> None:
        self._counts[bisect_left(self._bounds, value)] += count
        self._sum += value * count

    def collect(self) -> Iterable[Metric]:
        buckets: list[tuple[str, float]] = []
        total = 0
        for bound, count in zip([*map(str, self._bounds), "+Inf"], self._counts, strict=True):
            total += count
            buckets.append((bound, total))
        family = HistogramMetricFamily(self.name, self._documentation)
        family.add_metric([], buckets=buckets, sum_value=self._sum)
        yield family
