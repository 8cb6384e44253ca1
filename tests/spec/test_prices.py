"""A start-up table that is off: what is too dear in it is tried, and the draft length ends near the best fixed one."""

from __future__ import annotations

import random
from collections.abc import Callable

import numpy as np
import pytest

from server.engine.result import StepResult
from server.engine.speculation import Speculation
from server.spec.cost_table import CostGrid, CostTable
from server.spec.mixture import Mixture, plan_mixture
from server.spec.policy import PolicyState, RowsAlike, plan_uniform

TIERS = (1, 2, 3, 5)
ROWS = (1, 16, 64)
CONTEXT = 100.0
STEPS = 3000
NOISE = 0.04

Survival = list[float]
Plan = Callable[[PolicyState, CostTable, Survival, int], tuple[int, PolicyState]]


def small(rows: int, k: int) -> float:
    """Milliseconds as a small model's on a large GPU: k passes of the drafter, and hardly more for more tokens."""
    return 0.45 + 0.03 * k + (0.06 if k else 0.0) + 0.0012 * rows * (1 + k)


def large(rows: int, k: int) -> float:
    """As a large model's: flat as long as memory is what bounds it, then as many tokens as there are."""
    return 5.4 + 0.25 * k + 0.02 * max(0, rows * (1 + k) - 48)


SHAPES = {"small": small, "large": large}


def made(shape: Callable[[int, int], float], errors: dict[tuple[int, int], float] | None = None) -> CostTable:
    grid = CostGrid(ROWS, (0, *TIERS), (128,))
    factor = errors or {}
    return CostTable(grid, np.array([[[shape(r, k) * factor.get((r, k), 1.0)] for k in grid.drafts] for r in ROWS]))


def survival(p: float) -> Survival:
    return [p ** (j + 1) for j in range(max(TIERS))]


def uniform(state: PolicyState, table: CostTable, known: Survival, rows: int) -> tuple[int, PolicyState]:
    return plan_uniform(state, table, RowsAlike(known, rows, rows), CONTEXT, TIERS)


def mixed(state: PolicyState, table: CostTable, known: Survival, rows: int) -> tuple[int, PolicyState]:
    choice, state = plan_mixture(state, table, Mixture(rows, rows, [], known, CONTEXT), TIERS)
    return choice.k, state


def simulate(
    plan: Plan, shape: Callable[[int, int], float], table: CostTable, p: float, rows: int, seed: int
) -> tuple[float, float]:
    """Tokens a millisecond of the first half and of the second, by expected tokens and true costs, probes included."""
    rng, state, rates = random.Random(seed), PolicyState(), []
    known, last = survival(p), -1
    for _ in range(2):
        tokens = ms = 0.0
        for step in range(STEPS // 2):
            k, state = plan(state, table, known, rows)
            took = shape(rows, k)
            tokens, ms = tokens + rows * (1.0 + sum(known[:k])), ms + took
            if k != last or step % 5 == 0:  # as an engine does: any step of another kind, and some of the rest
                table.observe(rows, rows * (1 + k), CONTEXT, took * rng.lognormvariate(0.0, NOISE))
            last = k
        rates.append(tokens / ms)
    return rates[0], rates[1]


def errors_of(seed: int, rows: int) -> dict[tuple[int, int], float]:
    rng = random.Random(seed)
    return {(r, k): rng.choice((0.85, 0.93, 1.07, 1.15)) if r == rows else 1.0 for r in ROWS for k in (0, *TIERS)}


def best_fixed(shape: Callable[[int, int], float], p: float, rows: int) -> tuple[int, float]:
    rates = {k: (1.0 + sum(survival(p)[:k])) * rows / shape(rows, k) for k in (0, *TIERS)}
    k = max(rates, key=lambda k: rates[k])
    return k, rates[k]


@pytest.mark.parametrize("plan", [uniform, mixed])
@pytest.mark.parametrize("rows", ROWS)
@pytest.mark.parametrize("shape", SHAPES)
def test_a_table_that_errs_by_fifteen_per_cent_ends_near_the_best_fixed_length(
    shape: str, rows: int, plan: Plan
) -> None:
    truth = SHAPES[shape]
    for seed, p in enumerate((0.45, 0.7, 0.9)):
        _, after = simulate(plan, truth, made(truth, errors_of(seed, rows)), p, rows, seed)
        assert after >= 0.97 * best_fixed(truth, p, rows)[1], (p, seed)


@pytest.mark.parametrize("plan", [uniform, mixed])
@pytest.mark.parametrize(("shape", "p", "rows"), [("small", 0.6, 1), ("small", 0.8, 16), ("large", 0.6, 16)])
def test_the_best_length_is_found_though_it_alone_is_held_too_dear(shape: str, p: float, rows: int, plan: Plan) -> None:
    """The others look cheaper than they are: nothing but a probe of it shows that it is the best."""
    truth = SHAPES[shape]
    best, rate = best_fixed(truth, p, rows)
    assert best > 0
    table = made(truth, {(r, k): 1.15 if k == best else 0.85 for r in ROWS for k in TIERS})
    _, after = simulate(plan, truth, table, p, rows, 0)
    assert after >= 0.97 * rate


@pytest.mark.parametrize("plan", [uniform, mixed])
@pytest.mark.parametrize("rows", ROWS)
@pytest.mark.parametrize("shape", SHAPES)
def test_with_no_draft_ever_accepted_it_is_as_fast_as_plain_decoding(shape: str, rows: int, plan: Plan) -> None:
    truth = SHAPES[shape]
    for seed in range(2):
        halves = simulate(plan, truth, made(truth, errors_of(seed, rows)), 0.0, rows, seed)
        assert min(halves) >= 0.98 * rows / truth(rows, 0), seed


@pytest.mark.parametrize("p", [0.0, 0.75])
@pytest.mark.parametrize("shape", SHAPES)
def test_an_engine_that_learns_acceptance_too(shape: str, p: float) -> None:
    """Acceptance is drawn and learned, and the table is corrected as seldom as an engine does it."""
    truth, rows, rng = SHAPES[shape], 16, random.Random(1)
    best, best_rate = best_fixed(truth, p, rows)
    speculation = Speculation(made(truth, {(r, k): 1.15 if k == best else 0.9 for r in ROWS for k in TIERS}), 5, False)
    tokens = ms = 0.0
    for step in range(STEPS):
        k = speculation.num_draft_tokens(rows, rows)
        accepted = [next((j for j in range(k) if rng.random() >= p), k) for _ in range(rows)]
        result = StepResult.silent(rows, rows * (1 + k))
        result.num_drafted, result.num_accepted = [k] * rows, accepted
        result.emitted = [[0] * (1 + count) for count in accepted]
        result.verify_ms = truth(rows, k) * rng.lognormvariate(0.0, NOISE)
        speculation.record(result, CONTEXT, [True] * rows)
        if step >= STEPS // 3:
            tokens, ms = tokens + rows * (1.0 + sum(survival(p)[:k])), ms + truth(rows, k)
    assert tokens / ms >= 0.97 * best_rate
    assert tokens / ms >= 0.98 * rows / truth(rows, 0)


def test_what_is_known_well_is_not_in_doubt() -> None:
    table = made(small)
    unknown = table.doubt(1, 6, 4, CONTEXT)
    for _ in range(40):
        for k in (3, 5):
            table.observe(1, 1 + k, CONTEXT, small(1, k))
    assert 0.2 < unknown < 0.4
    assert table.doubt(1, 6, 4, CONTEXT) < 0.03 < table.doubt(1, 2, 4, CONTEXT) < unknown
    assert table.doubt(1, 4, 4, CONTEXT) == 0.0
