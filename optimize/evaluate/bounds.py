"""Confidence intervals for means over text, whose tokens are not independent.

Neighbouring tokens, and tokens of one document, go wrong together: taken one by one they would make every interval too
narrow. Documents are the sampling units; the mean over tokens is a ratio estimator (sum of a document's values by its
length: Cochran, Sampling Techniques, 3rd ed. 1977, section 9A.1), its standard error is the cluster-robust one with the
factor G / (G - 1), and the interval is Student's with G - 1 degrees of freedom (Cameron and Miller, A Practitioner's
Guide to Cluster-Robust Inference, Journal of Human Resources 50(2), 2015, sections II and VI.D).
"""

from __future__ import annotations

import math
import statistics
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

MIN_CLUSTERS = 20
"""Fewer documents make an interval that is too narrow; windows of text stand in for documents then."""


@dataclass(frozen=True, slots=True)
class Estimate:
    """A mean, its standard error, and the ends of the one-sided intervals below and above it.

    With one cluster nothing is known: the ends are infinite.
    """

    mean: float
    error: float
    low: float
    high: float
    num_clusters: int


def clustered(values: NDArray[Any], clusters: NDArray[Any], confidence: float) -> Estimate:
    """Of the mean of `values` [N]; `clusters` [N] int says which are of one document. N >= 1."""
    values = values.astype(np.float64)
    mean = float(values.mean())
    names, index = np.unique(clusters, return_inverse=True)
    groups = len(names)
    if groups < 2:
        return Estimate(mean, math.inf, -math.inf, math.inf, groups)
    sums = np.bincount(index, weights=values - mean, minlength=groups)
    error = math.sqrt(groups / (groups - 1) * float(sums @ sums)) / len(values)
    reach = student_quantile(confidence, groups - 1) * error
    return Estimate(mean, error, mean - reach, mean + reach, groups)


def student_quantile(p: float, freedom: int) -> float:
    """The p-quantile of Student's t, 0.5 <= p < 1.

    Newton's method on the distribution function, from Cornish and Fisher's expansion.
    """
    if p == 0.5:
        return 0.0
    if freedom == 1:
        return math.tan(math.pi * (p - 0.5))
    if freedom == 2:
        return (2 * p - 1) * math.sqrt(2 / (4 * p * (1 - p)))
    t = _expanded(p, freedom)
    for _ in range(50):
        step = (student_cdf(t, freedom) - p) / _student_density(t, freedom)
        t -= max(-1.0, min(1.0, step))
        if abs(step) < 1e-12 * max(1.0, t):
            break
    return t


def _expanded(p: float, freedom: int) -> float:
    """About the normal quantile, to second order (Abramowitz and Stegun, 26.7.5)."""
    z = statistics.NormalDist().inv_cdf(p)
    return z + (z**3 + z) / (4 * freedom) + (5 * z**5 + 16 * z**3 + 3 * z) / (96 * freedom**2)


def student_cdf(t: float, freedom: int) -> float:
    """P(T <= t) for t >= 0: the finite series in cos(atan(t / sqrt(freedom))) (Abramowitz and Stegun, 26.7.3-4)."""
    theta = math.atan2(t, math.sqrt(freedom))
    cosine, square = math.cos(theta), math.cos(theta) ** 2
    term, total = (cosine if freedom % 2 else 1.0), 0.0
    for k in range(freedom % 2 + 2, freedom + 1, 2):
        total += term
        term *= square * (k - 1) / k
    sine = math.sin(theta) * total
    return 0.5 + (2 / math.pi * (theta + sine) if freedom % 2 else sine) / 2


def _student_density(t: float, freedom: int) -> float:
    log = math.lgamma((freedom + 1) / 2) - math.lgamma(freedom / 2) - 0.5 * math.log(freedom * math.pi)
    return math.exp(log - (freedom + 1) / 2 * math.log1p(t * t / freedom))
