"""Exact percentiles, and how sure they are."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

Array = NDArray[np.float64]
CONFIDENCE = 0.95
_RESAMPLES = 400
_MOST_DRAWN = 40_000_000
"""Values times resamples; larger samples are resampled less often, since their intervals are narrow."""


@dataclass(frozen=True, slots=True)
class Sample:
    """Values in milliseconds; `owners[i]` numbers the request that value i belongs to, ascending."""

    values: Array
    owners: NDArray[np.int64]

    def __len__(self) -> int:
        return len(self.values)

    def percentile(self, percent: float) -> float:
        """Exact, of all values, with linear interpolation between neighbours (numpy's and vLLM's definition)."""
        return float(np.percentile(self.values, percent)) if len(self) else float("nan")

    @property
    def mean(self) -> float:
        """Of all values."""
        return float(self.values.mean()) if len(self) else float("nan")

    @property
    def std(self) -> float:
        """Of all values as the population, as numpy's and vLLM's."""
        return float(self.values.std()) if len(self) else float("nan")


def sample(values: Iterable[float], owners: Iterable[int]) -> Sample:
    """Values and the numbers of their requests, as a Sample."""
    return Sample(np.fromiter(values, np.float64), np.fromiter(owners, np.int64))


@dataclass(frozen=True, slots=True)
class Interval:
    """Where a figure lies with 95 % confidence."""

    low: float
    high: float


def intervals(of: Sample, percents: Iterable[float], seed: int = 0) -> dict[str, Interval]:
    """Bootstrap percentile intervals (Efron 1979) of the mean and the percentiles: keys `mean` and `pN`.

    Whole requests are drawn, not single values: the tokens of one answer are not independent (cluster bootstrap,
    Davison
    and Hinkley 1997, section 3.8). Requests are taken as independent, which under queueing makes intervals optimistic.
    """
    percents = list(percents)
    if not len(of):
        return {}
    order = np.argsort(of.values, kind="stable")
    values = of.values[order]
    _, owners = np.unique(of.owners, return_inverse=True)
    owners = owners[order]
    num_requests = int(owners.max()) + 1
    resamples = int(max(50, min(_RESAMPLES, _MOST_DRAWN // len(values))))
    random = np.random.default_rng(seed)
    drawn = np.empty((resamples, 1 + len(percents)))
    for row in drawn:
        times_drawn = np.bincount(random.integers(0, num_requests, num_requests), minlength=num_requests)
        weights = times_drawn[owners]
        cumulative = np.cumsum(weights)
        total = int(cumulative[-1])
        if not total:  # only requests without values were drawn
            row[:] = np.nan
            continue
        row[0] = values @ weights / total
        ranks = np.ceil(np.asarray(percents) / 100 * total).clip(1, total)
        row[1:] = values[np.searchsorted(cumulative, ranks)]
    tail = (1 - CONFIDENCE) / 2 * 100
    low, high = np.nanpercentile(drawn, (tail, 100 - tail), axis=0)
    names = ["mean", *(f"p{percent:g}" for percent in percents)]
    return {name: Interval(float(a), float(b)) for name, a, b in zip(names, low, high, strict=True)}
