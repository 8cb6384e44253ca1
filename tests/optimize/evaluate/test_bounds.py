from __future__ import annotations

import math

import numpy as np
import pytest
from scipy import stats

from optimize.evaluate.bounds import clustered, student_cdf, student_quantile


@pytest.mark.parametrize("freedom", [1, 2, 3, 4, 5, 19, 78, 1001])
@pytest.mark.parametrize("p", [0.5, 0.6, 0.9, 0.95, 0.999])
def test_quantiles_of_student(p: float, freedom: int) -> None:
    assert student_quantile(p, freedom) == pytest.approx(stats.t.ppf(p, freedom), rel=1e-9, abs=1e-12)
    assert student_cdf(1.7, freedom) == pytest.approx(stats.t.cdf(1.7, freedom), rel=1e-12)


def test_by_hand() -> None:
    """Two documents of two tokens: means 1 and 3, so the mean is 2 and its standard error 1."""
    found = clustered(np.array([0.0, 2.0, 3.0, 3.0]), np.array([7, 7, 4, 4]), 0.95)
    assert (found.mean, found.error, found.num_clusters) == (2.0, 1.0, 2)
    assert found.high == pytest.approx(2 + stats.t.ppf(0.95, 1))
    assert found.low == pytest.approx(2 - stats.t.ppf(0.95, 1))


def test_one_document_says_nothing_of_others() -> None:
    found = clustered(np.array([1.0, 2.0]), np.array([0, 0]), 0.95)
    assert (found.mean, found.low, found.high) == (1.5, -math.inf, math.inf)


def test_coverage_of_dependent_tokens_in_documents_of_all_lengths() -> None:
    """Of 2,000 texts with a common part a document, 95 % have a bound above the true mean; token by token it would be
    much fewer."""
    draw = np.random.default_rng(0)
    lengths = np.minimum(draw.geometric(1 / 60, 80) + 5, 150)
    clusters = np.repeat(np.arange(80), lengths)
    covered = naive = 0
    trials = 2000
    for _ in range(trials):
        values = 0.1 * draw.standard_t(5, 80)[clusters] + 0.3 * draw.standard_normal(len(clusters)) + 0.02
        covered += clustered(values, clusters, 0.95).high >= 0.02
        naive += clustered(values, np.arange(len(values)), 0.95).high >= 0.02
    assert abs(covered / trials - 0.95) < 0.02
    assert naive / trials < 0.85
