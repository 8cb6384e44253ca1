"""Tests and intervals that hold at every moment at once: one may look after each request and stop whenever one likes.

Two of them, each an exact or asymptotic supermartingale bounded by Ville's inequality:

- `radius`: half the width of an asymptotic confidence sequence (Waudby-Smith, Arbour, Sinha, Kennedy and Ramdas,
  "Time-uniform central limit theory and asymptotic confidence sequences", Annals of Statistics 2024, theorem 2.2),
  which is also the mixture sequential probability ratio test with a normal mixture (Robbins 1970; Johari, Koomen,
  Pekelis and Walsh, "Always valid inference", Operations Research 2022). Written in the estimate's variance, it
  takes one that allows for clusters.
- `coin_interval`: the mixture SPRT of a coin with a Beta mixture, which is exact at any count: for rare events, where
  nothing is normal.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import lru_cache

from scipy import special, stats


def radius(variance: float, alpha: float, scale: float, clusters: float) -> float:
    """Half the width of the confidence sequence of an estimate.

    P(at any moment |estimate - truth| > radius) <= `alpha`. `variance` is the estimate's own, `scale` the standard
    deviation of the mixture: the size of effects for which the sequence is tightest; any positive value is valid.
    `clusters` is the number of independent parts that `variance` was estimated from: with few of them it is scaled
    by the square of t's quantile over the normal's (Cameron and Miller, "A practitioner's guide to cluster-robust
    inference", 2015). Infinite where nothing can be said.
    """
    if not variance > 0 or clusters < 2:
        return math.inf
    v = variance * _small_sample(int(clusters) - 1, alpha)
    spread = v + scale * scale
    return math.sqrt(v * spread / (scale * scale) * (2 * math.log(1 / alpha) + math.log(spread / v)))


@lru_cache(maxsize=4096)
def _small_sample(degrees: int, alpha: float) -> float:
    return float((stats.t.ppf(1 - alpha / 2, degrees) / stats.norm.ppf(1 - alpha / 2)) ** 2)


def coin_interval(ours: int, theirs: int, alpha: float) -> tuple[float, float]:
    """Confidence sequence of the probability that an incident is ours: all p that the mixture SPRT does not reject.

    The likelihood under a uniform mixture over that under p is an e-process whatever the order of incidents (Robbins
    1970): it ever passes 1 / alpha with probability at most alpha. Exact at any count.
    """
    mixture = special.betaln(ours + 1, theirs + 1) + math.log(alpha)

    def rejected(p: float) -> bool:
        return bool(special.xlogy(ours, p) + special.xlog1py(theirs, -p) <= mixture)

    centre = ours / max(ours + theirs, 1) if ours + theirs else 0.5
    return _edge(rejected, centre, 0.0), _edge(rejected, centre, 1.0)


def _edge(rejected: Callable[[float], bool], inside: float, end: float) -> float:
    """The point between `inside`, which is not rejected, and `end` where rejection begins, from outside."""
    if not rejected(end):
        return end
    for _ in range(40):
        middle = (inside + end) / 2
        if rejected(middle):
            end = middle
        else:
            inside = middle
    return end
