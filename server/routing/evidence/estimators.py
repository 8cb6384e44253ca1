"""Estimates with confidence sequences: quantile ratios, mean ratios, mean differences."""

from __future__ import annotations

import math

import numpy as np

from server.routing.evidence.clusters import clustered_variance
from server.routing.evidence.columns import Floats
from server.routing.evidence.metrics import Metric
from server.routing.evidence.sequences import radius
from server.routing.evidence.strata import Cut

MIN_CLUSTERS = 8
"""With fewer independent keys or time blocks nothing is said."""
BUCKET = 1.01
"""Quantiles are read from buckets that are 1 % wide, and bounds from their outer edges."""
_LOG_BUCKET = math.log(BUCKET)
_ZERO = 700
"""Buckets below 1 ms: down to a microsecond."""

Interval = tuple[float, float, float]
"""Estimate, lower bound, upper bound."""
NOTHING: Interval = (math.nan, -math.inf, math.inf)


def quantile_interval(cut: Cut, metric: Metric, alpha: float) -> Interval:
    """A quantile's logarithm with its confidence sequence.

    The share of requests at or below the true quantile q is p; a confidence sequence for that share at one fixed
    point is inverted: all x whose share is within the radius of p (Howard and Ramdas, "Sequential estimation of
    quantiles with applications to A/B testing and best-arm identification", Bernoulli 2022, theorem 1; here with the
    clustered variance of the share at the estimate, as in Woodruff 1952, in place of independent draws).
    """
    p = metric.quantile
    codes = np.clip(np.floor(np.log(np.maximum(cut.values, 1e-9)) / _LOG_BUCKET).astype(np.int64) + _ZERO, 0, None)
    cumulative = np.cumsum(np.bincount(codes, cut.weights))
    at = _first(cumulative, p)
    if at is None:  # rounding
        return NOTHING
    share, residuals = cut.centred((codes <= at).astype(np.float64))
    variance = clustered_variance(residuals, cut.clusters)
    # One request more or less is as much as the share can be known to.
    variance = max(variance, share * (1 - share) / len(codes), p * (1 - p) / len(codes))
    width = radius(variance, alpha, metric.scale, cut.clusters.count)
    low = _first(cumulative, p - width) if p > width else None
    high = _first(cumulative, p + width)
    lower = -math.inf if low is None else (low - _ZERO) * _LOG_BUCKET
    upper = math.inf if high is None else (high + 1 - _ZERO) * _LOG_BUCKET
    return (at + 0.5 - _ZERO) * _LOG_BUCKET, lower, upper


def _first(cumulative: Floats, share: float) -> int | None:
    """The first bucket at which `share` of the weight is reached; None where that is all of it or more."""
    if share >= 1.0 - 1e-9:
        return None
    return min(int(np.searchsorted(cumulative, share)), len(cumulative) - 1)


def quantile_ratio(candidate: Cut, baseline: Cut, metric: Metric, alpha: float) -> Interval:
    """Logarithm of the quantiles' ratio, its bounds from the arms' own (MOVER: Zou and Donner, "Construction of
    confidence limits about effect measures", Statistics in Medicine 2008)."""
    ours, theirs = (quantile_interval(cut, metric, alpha) for cut in (candidate, baseline))
    difference = ours[0] - theirs[0]
    lower = difference - math.hypot(ours[0] - ours[1], theirs[2] - theirs[0])
    upper = difference + math.hypot(ours[2] - ours[0], theirs[0] - theirs[1])
    return difference, lower, upper


def mean_comparison(candidate: Cut, baseline: Cut, metric: Metric, alpha: float) -> Interval:
    """Difference of means, or logarithm of their ratio (delta method), with its asymptotic confidence sequence."""
    means, variances = [], []
    for cut in (candidate, baseline):
        mean, residuals = cut.centred(cut.values)
        variance = clustered_variance(residuals, cut.clusters)
        if metric.estimator == "ratio":
            if mean <= 0:
                return NOTHING
            mean, variance = math.log(mean), variance / mean**2
        means.append(mean)
        variances.append(variance)
    clusters = min(candidate.clusters.count, baseline.clusters.count)
    width = radius(sum(variances), alpha, metric.scale, clusters)
    difference = means[0] - means[1]
    return difference, difference - width, difference + width


def interval_of(candidate: Cut, baseline: Cut, metric: Metric, alpha: float) -> Interval:
    """The effect on `metric`: a relative change for ratios (logarithms turned back), else a difference."""
    if min(candidate.clusters.count, baseline.clusters.count) < MIN_CLUSTERS:
        return NOTHING
    if metric.estimator == "difference":
        return mean_comparison(candidate, baseline, metric, alpha)
    compare = quantile_ratio if metric.estimator == "quantile" else mean_comparison
    estimate, lower, upper = (
        math.expm1(x) if x < 50 else math.inf for x in compare(candidate, baseline, metric, alpha)
    )
    return estimate, lower, upper
