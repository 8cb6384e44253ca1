"""DDSketch: quantiles with a bounded relative error, in a few hundred counters that add up over processes.

Masson, Rim and Lee, "DDSketch: a fast and fully-mergeable quantile sketch with relative-error guarantees", VLDB 2019:
bucket i counts the values in (γ^(i-1), γ^i] with γ = (1 + α) / (1 - α), and stands for 2 γ^i / (γ + 1), which is at
most a share α from each of them. Here the range is fixed, so a sketch is one array and merging is addition. Values are
added in batches, each for a twentieth of what the library `ddsketch` takes (benchmarks/telemetry_cost.py).
"""

from __future__ import annotations

import math

import numpy as np
from numpy.typing import NDArray

RELATIVE_ERROR = 0.01
"""α: what a quantile may be off by, as a share of the value at that rank."""
LOWEST_S, HIGHEST_S = 1e-6, 1e5
"""Values outside count as if they lay on the bound."""

_GAMMA = (1 + RELATIVE_ERROR) / (1 - RELATIVE_ERROR)
_PER_LOG = 1 / math.log(_GAMMA)
_FIRST = math.ceil(math.log(LOWEST_S) * _PER_LOG)
NUM_BUCKETS = math.ceil(math.log(HIGHEST_S) * _PER_LOG) - _FIRST + 1


class Sketch:
    """The distribution of non-negative values, in seconds. `total` is their sum, so that a mean is exact."""

    __slots__ = ("counts", "total")

    def __init__(self) -> None:
        self.counts: NDArray[np.int64] = np.zeros(NUM_BUCKETS, dtype=np.int64)
        self.total = 0.0

    @property
    def count(self) -> int:
        """How many values there are."""
        return int(self.counts.sum())

    def add(self, values: NDArray[np.float64], weights: NDArray[np.float64] | None = None) -> None:
        """`values` [n] in seconds; `weights` [n], whole numbers: how often each occurred (once by default)."""
        with np.errstate(divide="ignore"):  # log(0) is -inf, which is below the range like any other
            index = np.ceil(np.log(values) * _PER_LOG) - _FIRST
        index = np.clip(index, 0, NUM_BUCKETS - 1).astype(np.int64)
        added = np.bincount(index, weights)
        self.counts[: len(added)] += added.astype(np.int64)
        self.total += float(values.sum() if weights is None else values @ weights)

    def merge(self, other: Sketch) -> None:
        """What `other` counted counts here too."""
        self.counts += other.counts
        self.total += other.total

    def quantiles(self, shares: tuple[float, ...]) -> list[float] | None:
        """The least values that at least `share` of all do not exceed (nearest rank), each within RELATIVE_ERROR.

        So P99 of three values is the largest. None where there is nothing.
        """
        cumulated = np.cumsum(self.counts)
        count = int(cumulated[-1])
        if count == 0:
            return None
        # What 0.07 * 100 is more than 7 by is rounding, not a value more.
        ranks = [max(0, math.ceil(share * count * (1 - 1e-12)) - 1) for share in shares]
        buckets = np.searchsorted(cumulated, ranks, side="right")
        return [2 * _GAMMA ** (int(bucket) + _FIRST) / (_GAMMA + 1) for bucket in buckets]

    # -- to other processes ------------------------------------------------------------------------------------

    def packed(self) -> tuple[int, bytes]:
        """The first bucket that has any, and the counts from there to the last that has (little-endian, 4 bytes)."""
        filled = np.flatnonzero(self.counts)
        if not len(filled):
            return 0, b""
        first = int(filled[0])
        return first, self.counts[first : int(filled[-1]) + 1].astype("<u4").tobytes()

    def add_packed(self, first: int, counts: bytes, total: float) -> None:
        """What another sketch's `packed` and `total` are."""
        added = np.frombuffer(counts, "<u4")
        self.counts[first : first + len(added)] += added
        self.total += total
