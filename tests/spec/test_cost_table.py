from __future__ import annotations

import random
from collections.abc import Callable

import numpy as np
import pytest

from server.spec.cost_measure import measure
from server.spec.cost_table import CostGrid, CostTable, cache_key, machine_identity

GRID = CostGrid(rows=(1, 2, 4, 8, 16), drafts=(0, 1, 2, 3, 5, 7), contexts=(128, 1024, 4096))


def linear(rows: float, tokens: float, context: float) -> float:
    return 5.0 + 0.3 * rows + 1.2 * tokens + 0.001 * context


def table_of(cost: Callable[[float, float, float], float], grid: CostGrid = GRID) -> CostTable:
    verify = [[[cost(r, r * (1 + k), c) for c in grid.contexts] for k in grid.drafts] for r in grid.rows]
    draft = [[0.1 * r * k for k in grid.drafts] for r in grid.rows]
    return CostTable(grid, np.array(verify), np.array(draft))


@pytest.mark.parametrize(
    ("rows", "tokens", "context"),
    [(1, 1, 128), (1, 8, 128), (16, 128, 4096), (3, 7, 700), (5, 5, 1024), (8, 30, 2000), (16, 17, 128), (2, 12, 128)],
)
def test_interpolation_is_exact_for_linear_costs(rows: int, tokens: int, context: int) -> None:
    assert table_of(linear).verify_ms(rows, tokens, context) == pytest.approx(linear(rows, tokens, context))


def test_measured_points_are_kept_even_where_cost_falls() -> None:
    measured = {1: 22.0, 2: 25.0, 3: 18.0, 4: 18.0, 6: 18.0, 8: 24.0}
    table = table_of(lambda r, tokens, c: measured.get(int(tokens), 30.0), CostGrid((1,), (0, 1, 2, 3, 5, 7), (128,)))
    for tokens, ms in measured.items():
        assert table.verify_ms(1, tokens, 500) == pytest.approx(ms)
    assert table.verify_ms(1, 7, 500) == pytest.approx(21.0)


def test_costs_past_the_grid_go_on_rising() -> None:
    table = table_of(linear)
    assert table.verify_ms(1, 20, 128) == pytest.approx(linear(1, 20, 128))
    assert table.verify_ms(32, 32, 128) == pytest.approx(linear(32, 32, 128))
    assert table.verify_ms(1, 1, 8192) == pytest.approx(linear(1, 1, 8192))
    assert table.verify_ms(1, 1, 0) == pytest.approx(linear(1, 1, 128))
    falling = table_of(lambda rows, tokens, context: 100.0 - tokens / 2)
    assert falling.verify_ms(16, 200, 128) == pytest.approx(falling.verify_ms(16, 128, 128))
    assert falling.verify_ms(64, 64, 128) == pytest.approx(falling.verify_ms(16, 16, 128))


def test_a_rising_table_interpolates_to_a_rising_curve() -> None:
    rng = np.random.default_rng(0)
    grid = CostGrid((1, 4, 16), (0, 1, 3, 7), (128, 1024))
    verify = 10.0 + rng.random(grid.shape).cumsum(0).cumsum(1).cumsum(2)
    table = CostTable(grid, verify)
    for rows in (1, 3, 9, 16, 20):
        curve = table.verify_curve(rows, rows * 10, 500)
        assert len(curve) == rows * 9 + 1
        assert curve == sorted(curve)
        assert curve[rows] == pytest.approx(table.verify_ms(rows, 2 * rows, 500))


def test_noise_along_the_context_is_made_monotone() -> None:
    table = table_of(lambda rows, tokens, context: 30.0 if context < 1000 else 25.0)
    assert table.verify_ms(1, 1, 4096) == 30.0


def test_draft_costs_interpolate_and_none_is_free() -> None:
    table = table_of(linear)
    assert table.draft_ms(3, 4) == pytest.approx(1.2)
    assert table.draft_ms(16, 0) == 0.0
    assert CostTable(GRID, np.ones(GRID.shape)).draft_ms(4, 4) == 0.0


def feed(table: CostTable, true_ms: Callable[[int, int], float], visits: list[tuple[int, int]], repeat: int) -> None:
    rng = random.Random(0)
    for _ in range(repeat):
        for rows, tokens in visits:
            table.observe(rows, tokens, 128, true_ms(rows, tokens) * rng.lognormvariate(0.0, 0.05))


def test_a_cell_that_lies_is_corrected_against_the_others() -> None:
    table = table_of(linear)

    def true_ms(rows: int, tokens: int) -> float:
        return linear(rows, tokens, 128) * (3.0 if tokens == 4 else 1.0)

    feed(table, true_ms, [(1, 1), (1, 4)], 20)
    assert table.verify_ms(1, 4, 128) / table.verify_ms(1, 1, 128) == pytest.approx(
        true_ms(1, 4) / true_ms(1, 1), rel=0.1
    )


def test_one_look_at_plain_decoding_unmasks_a_cell_that_was_always_used() -> None:
    table = table_of(linear)
    feed(table, lambda rows, tokens: 2.0 * linear(rows, tokens, 128), [(1, 4)], 200)
    feed(table, lambda rows, tokens: linear(rows, tokens, 128), [(1, 1)], 3)
    said = linear(1, 4, 128) / linear(1, 1, 128)
    assert table.verify_ms(1, 4, 128) / table.verify_ms(1, 1, 128) > 1.5 * said


@pytest.mark.parametrize("visits", [[(1, 1)], [(1, 4)], [(1, 1), (1, 2), (1, 4), (2, 6)]])
def test_a_slowdown_of_everything_changes_no_ratio(visits: list[tuple[int, int]]) -> None:
    table = table_of(linear)
    feed(table, lambda rows, tokens: linear(rows, tokens, 128), visits, 100)
    before = {tokens: table.verify_ms(1, tokens, 128) for tokens in range(1, 9)}
    draft_share = table.draft_ms(1, 3) / before[4]
    feed(table, lambda rows, tokens: 2.0 * linear(rows, tokens, 128), visits, 200)
    for tokens, ms in before.items():
        assert table.verify_ms(1, tokens, 128) / ms == pytest.approx(2.0, rel=0.1)
        ratio = table.verify_ms(1, tokens, 128) / table.verify_ms(1, 1, 128)
        assert ratio == pytest.approx(ms / before[1], rel=0.05)
    assert table.draft_ms(1, 3) / table.verify_ms(1, 4, 128) == pytest.approx(draft_share, rel=0.05)


def test_a_single_hiccup_moves_little() -> None:
    table = table_of(linear)
    feed(table, lambda rows, tokens: linear(rows, tokens, 128), [(1, 1), (1, 4)], 50)
    before = table.verify_ms(1, 4, 128)
    table.observe(1, 4, 128, 100 * before)
    assert table.verify_ms(1, 4, 128) < 1.15 * before


def test_ragged_and_outlying_observations_stay_finite() -> None:
    table = table_of(linear)
    rng = random.Random(2)
    for _ in range(3000):
        rows = rng.randrange(1, 40)
        tokens = rows + rng.randrange(8 * rows)
        table.observe(rows, tokens, rng.randrange(9000), linear(rows, tokens, 500) * rng.choice([0.5, 1.0, 1.0, 4.0]))
        assert 0.0 < table.verify_ms(rows, tokens, 500) < 10 * linear(rows, tokens, 9000)


def test_json_keeps_the_table_and_what_was_learned_but_not_the_common_slowdown() -> None:
    table = table_of(linear)
    feed(table, lambda rows, tokens: 2.0 * linear(rows, tokens, 128) * (1 + (tokens == 4)), [(1, 1), (1, 4)], 50)
    copy = CostTable.from_json(table.to_json())
    assert copy.grid == GRID
    assert copy.draft_ms(3, 4) == pytest.approx(1.2)
    ratio = table.verify_ms(1, 4, 128) / table.verify_ms(1, 1, 128)
    assert copy.verify_ms(1, 4, 128) / copy.verify_ms(1, 1, 128) == pytest.approx(ratio)
    assert copy.verify_ms(1, 1, 128) == pytest.approx(linear(1, 1, 128), rel=0.4)


@pytest.mark.parametrize("text", ["{}", "[]", "nonsense", '{"version": 0}', '{"version": 1, "rows": 3}'])
def test_what_is_no_cost_table_is_refused(text: str) -> None:
    with pytest.raises(ValueError, match=r"cost table|version|Expecting"):
        CostTable.from_json(text)


@pytest.mark.parametrize(
    ("rows", "drafts", "contexts", "named"),
    [
        ((), (0,), (1,), "rows"),
        ((2, 1), (0,), (1,), "rows"),
        ((1,), (1, 2), (1,), "drafts"),
        ((1,), (0,), (-1,), "con"),
    ],
)
def test_bad_grids_are_refused(
    rows: tuple[int, ...], drafts: tuple[int, ...], contexts: tuple[int, ...], named: str
) -> None:
    with pytest.raises(ValueError, match=named):
        CostGrid(rows, drafts, contexts)


def test_bad_costs_are_refused() -> None:
    with pytest.raises(ValueError, match="do not fit"):
        CostTable(GRID, np.ones((1, 1, 1)))
    with pytest.raises(ValueError, match="finite"):
        CostTable(GRID, np.zeros(GRID.shape))
    with pytest.raises(ValueError, match="ms: 0"):
        table_of(linear).observe(1, 1, 128, 0.0)


def test_the_cache_key_depends_on_machine_artifact_and_grid() -> None:
    machine = machine_identity()
    key = cache_key(machine, "a", GRID)
    other_grid = CostGrid((1,), (0,), (128,))
    others = [cache_key(machine, "b", GRID), cache_key({**machine, "threads": "1"}, "a", GRID)]
    assert len({key, *others, cache_key(machine, "a", other_grid)}) == 4
    assert key == cache_key(dict(reversed(list(machine.items()))), "a", GRID)


def test_measuring_takes_the_median_of_passes() -> None:
    calls: dict[tuple[int, int, int], int] = {}

    def run(rows: int, drafts: int, context: int) -> float:
        cell = (rows, drafts, context)
        calls[cell] = calls.get(cell, 0) + 1
        return linear(rows, rows * (1 + drafts), context) * (9.0 if calls[cell] == 2 else 1.0)

    grid = CostGrid((1, 4), (0, 3, 7), (128, 1024))
    table = measure(grid, run, draft=lambda rows, drafts: 0.5 * drafts, follow=lambda rows: 0.25 * rows, budget_s=60.0)
    assert [table.follow_ms(rows) for rows in (1, 2, 4)] == [0.25, 0.5, 1.0]
    assert CostTable.from_json(table.to_json()).follow_ms(4) == 1.0
    assert table.verify_ms(4, 16, 1024) == pytest.approx(linear(4, 16, 1024))
    assert table.draft_ms(1, 3) == pytest.approx(1.5)
    assert set(calls.values()) == {3, 4}


@pytest.mark.parametrize("budget_s", [0.0, 8.5, 30.5])
def test_measuring_stops_at_the_budget_and_fills_the_rest(budget_s: float) -> None:
    now = [0.0]

    def run(rows: int, drafts: int, context: int) -> float:
        now[0] += 1.0
        return 10.0 + rows * (1 + drafts)

    table = measure(GRID, run, budget_s=budget_s, clock=lambda: now[0])
    assert now[0] <= budget_s + 2.0
    if budget_s > 0:
        assert table.verify_ms(16, 128, 128) == pytest.approx(138.0)
        assert table.verify_ms(4, 16, 1024) == pytest.approx(26.0, rel=0.05)
