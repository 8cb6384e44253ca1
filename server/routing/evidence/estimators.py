"""Estimates with confidence sequences: quantile ratios, mean ratios, mean differences."""

from __future__ import annotations

import math

import numpy as np

from server.routing.evidence.columns import Floats, Ints
from server.routing.evidence.metrics import Metric
from server.routing.evidence.sequences import radius
from server.routing.evidence.strata import Cut, Pair

MIN_CLUSTERS = 12
"""With fewer independent keys or time blocks nothing is said."""
BUCKET = 1.01
"""Quantiles are read from buckets that are 1 % wide, and bounds from their outer edges."""
_LOG_BUCKET = math.log(BUCKET)
_ZERO = 700
"""Buckets below 1 ms: down to a microsecond."""

Interval = tuple[float, float, float]
"""Estimate, lower bound, upper bound."""
NOTHING: Interval = (math.nan, -math.inf, math.inf)


def quantile_ratio(both: Pair, metric: Metric, alpha: float) -> Interval:
    """Logarithm of the ratio of the arms' quantiles, with its confidence sequence.

    The share of requests at or below a true quantile is p; a confidence sequence for that share at one fixed point
    is inverted to one for the quantile: all x whose share is within the radius of p (Howard and Ramdas, "Sequential
    estimation of quantiles with applications to A/B testing and best-arm identification", Bernoulli 2022, theorem 1;
    here with a clustered variance, as in Woodruff 1952, in place of independent draws). The variance is of the
    difference of the arms' shares at one point midway between the two quantiles: at each arm's own quantile
    the shares are equal by construction, and what the arms differ by would be missing from it. Each arm has half, and
    the ratio's bounds come from the arms' own (MOVER: Zou and Donner, "Construction of confidence limits about effect
    measures", Statistics in Medicine 2008).
    """
    p = metric.quantile
    sides = [_buckets(cut) for cut in (both.candidate, both.baseline)]
    at = [_first(cumulative, p) for _, cumulative in sides]
    if at[0] is None or at[1] is None:
        return NOTHING
    point = (at[0] + at[1]) // 2
    below = [(codes <= point).astype(np.float64) for codes, _ in sides]
    _, variance = both.difference(below[0], below[1])
    # One request more or less is as much as a share can be known to.
    variance = max(variance, p * (1 - p) * sum(1 / len(codes) for codes, _ in sides))
    width = radius(variance / 2, alpha, metric.scale, both.clusters.count)
    bounds = [_bounds(cumulative, p, width) for _, cumulative in sides]
    ours, theirs = ((x + 0.5 - _ZERO) * _LOG_BUCKET for x in (at[0], at[1]))
    difference = ours - theirs
    lower = difference - math.hypot(ours - bounds[0][0], bounds[1][1] - theirs)
    upper = difference + math.hypot(bounds[0][1] - ours, theirs - bounds[1][0])
    return difference, lower, upper


def _buckets(cut: Cut) -> tuple[Ints, Floats]:
    """Bucket of each value [n], and the weight at or below each bucket."""
    codes = np.floor(np.log(np.maximum(cut.values, 1e-9)) / _LOG_BUCKET).astype(np.int64) + _ZERO
    codes = np.maximum(codes, 0)
    return codes, np.cumsum(np.bincount(codes, cut.weights))


def _bounds(cumulative: Floats, p: float, width: float) -> tuple[float, float]:
    """The outer edges (logarithms) of the buckets where p - width and p + width of the weight are reached."""
    low = _first(cumulative, p - width) if p > width else None
    high = _first(cumulative, p + width)
    lower = -math.inf if low is None else (low - _ZERO) * _LOG_BUCKET
    upper = math.inf if high is None else (high + 1 - _ZERO) * _LOG_BUCKET
    return lower, upper


def _first(cumulative: Floats, share: float) -> int | None:
    """The first bucket at which `share` of the weight is reached; None where that is all of it or more."""
    if share >= 1.0 - 1e-9:
        return None
    return min(int(np.searchsorted(cumulative, share)), len(cumulative) - 1)


def mean_comparison(both: Pair, metric: Metric, alpha: float) -> Interval:
    """Difference of means, or logarithm of their ratio (delta method), with its asymptotic confidence sequence."""
    cuts = (both.candidate, both.baseline)
    ours, theirs = (float(cut.weights @ cut.values) for cut in cuts)
    if metric.estimator == "ratio":
        if ours <= 0 or theirs <= 0:
            return NOTHING
        difference = math.log(ours / theirs)
        middle = (ours + theirs) / 2  # one for both, or the arms would be equal by construction
        _, variance = both.difference(cuts[0].values / middle, cuts[1].values / middle)
    else:
        difference, variance = both.difference(cuts[0].values, cuts[1].values)
    width = radius(variance, alpha, metric.scale, both.clusters.count)
    return difference, difference - width, difference + width


def interval_of(both: Pair, metric: Metric, alpha: float) -> Interval:
    """The effect on `metric`: a relative change for ratios (logarithms turned back), else a difference."""
    if both.clusters.count < MIN_CLUSTERS:
        return NOTHING
    if metric.estimator == "difference":
        return mean_comparison(both, metric, alpha)
    compare = quantile_ratio if metric.estimator == "quantile" else mean_comparison
    estimate, lower, upper = (math.expm1(x) if x < 50 else math.inf for x in compare(both, metric, alpha))
    return estimate, lower, upper
