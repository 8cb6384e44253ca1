from __future__ import annotations

import numpy as np
import pytest

from server.telemetry.sketch import HIGHEST_S, LOWEST_S, RELATIVE_ERROR, Sketch

SHARES = (0.0, 0.01, 0.5, 0.95, 0.99, 0.999, 1.0)


def exact(values: np.ndarray, shares: tuple[float, ...] = SHARES) -> np.ndarray:
    return np.asarray(np.quantile(values, shares, method="inverted_cdf"))


@pytest.mark.parametrize("seed", range(5))
@pytest.mark.parametrize("shape", ["lognormal", "uniform", "pareto", "two points"])
def test_every_quantile_is_within_the_stated_error(shape: str, seed: int) -> None:
    rng = np.random.default_rng(seed)
    values = {
        "lognormal": rng.lognormal(-4, 2, 3000),
        "uniform": rng.uniform(0.001, 1, 3000),
        "pareto": np.minimum((rng.pareto(1, 3000) + 1) * 1e-3, 1e4),
        "two points": np.where(rng.random(3000) < 0.97, 0.01, 2.0),
    }[shape]
    sketch = Sketch()
    for part in np.array_split(values, 7):
        sketch.add(part)
    found = sketch.quantiles(SHARES)
    assert found is not None
    np.testing.assert_allclose(found, exact(values), rtol=RELATIVE_ERROR * (1 + 1e-9))
    assert sketch.count == len(values)
    assert sketch.total == pytest.approx(values.sum())


def test_merged_sketches_equal_one_of_all_values() -> None:
    rng = np.random.default_rng(0)
    values = rng.lognormal(-3, 1, 1000)
    whole, first, second, sent = Sketch(), Sketch(), Sketch(), Sketch()
    whole.add(values)
    first.add(values[:300])
    second.add(values[300:])
    sent.add_packed(*second.packed(), second.total)
    sent.add_packed(*Sketch().packed(), 0.0)
    first.merge(sent)
    np.testing.assert_array_equal(first.counts, whole.counts)
    assert first.total == pytest.approx(whole.total)


def test_a_weight_is_that_many_values() -> None:
    weighted, repeated = Sketch(), Sketch()
    weighted.add(np.array([0.1, 0.7]), np.array([3.0, 1.0]))
    repeated.add(np.array([0.1, 0.1, 0.1, 0.7]))
    np.testing.assert_array_equal(weighted.counts, repeated.counts)
    assert weighted.total == pytest.approx(repeated.total)


def test_values_out_of_range_count_at_the_bounds() -> None:
    sketch = Sketch()
    sketch.add(np.array([0.0, 1e-9, 1e9]))
    found = sketch.quantiles((0.0, 1.0))
    assert sketch.count == 3
    np.testing.assert_allclose(found or [], [LOWEST_S, HIGHEST_S], rtol=2 * RELATIVE_ERROR)


def test_nothing_has_no_quantiles() -> None:
    assert Sketch().quantiles((0.5,)) is None


def test_few_values_are_ranked_from_above() -> None:
    """Nobody's P99 of three requests is the one in the middle."""
    sketch = Sketch()
    sketch.add(np.array([0.01, 0.02, 0.05]))
    found = sketch.quantiles((0.5, 0.95, 0.99))
    assert found is not None
    np.testing.assert_allclose(found, [0.02, 0.05, 0.05], rtol=RELATIVE_ERROR)
