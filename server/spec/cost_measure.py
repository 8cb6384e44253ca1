"""Measuring a cost table within a time budget. The engine brings the callback that runs one step."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable

import numpy as np

from server.spec.cost_table import Array, CostGrid, CostTable


def measure(
    grid: CostGrid,
    run: Callable[[int, int, int], float],
    draft: Callable[[int, int], float] | None = None,
    follow: Callable[[int], float] | None = None,
    budget_s: float = 5.0,
    repeats: int = 3,
    clock: Callable[[], float] = time.perf_counter,
) -> CostTable:
    """Time `run(rows, drafts a row, context) -> ms`, `draft(rows, drafts a row) -> ms` and `follow(rows) -> ms` over
    the grid; the last is timed once, whatever the budget: it is asked for few cells.

    The median of `repeats` counts; repeats are passes over the whole grid, so that a short disturbance of the host
    hits many cells once instead of one cell every time. When `budget_s` seconds are over, measuring stops: cells go
    from coarse to fine, and those that were not reached are interpolated over the tokens of a step.
    """
    start = clock()
    times: dict[tuple[int, int, int], list[float]] = {}
    draft_times: dict[tuple[int, int], list[float]] = {}
    cells = _coarse_to_fine(grid.shape)
    run(grid.rows[0], grid.drafts[0], grid.contexts[0])  # the first call pays for allocations and lazy initialisation
    for row, column, depth in cells * repeats:
        if times and clock() - start > budget_s:
            break
        rows, drafts, context = grid.rows[row], grid.drafts[column], grid.contexts[depth]
        times.setdefault((row, column, depth), []).append(run(rows, drafts, context))
        if draft is not None and drafts > 0 and depth == 0:
            draft_times.setdefault((row, column), []).append(draft(rows, drafts))
    verify = _fill(grid, {cell: statistics.median(ms) for cell, ms in times.items()})
    drafting = {(row, column, 0): statistics.median(ms) for (row, column), ms in draft_times.items()}
    drafted = np.zeros(grid.shape[:2])
    if drafting:
        single = CostGrid(grid.rows, grid.drafts, grid.contexts[:1])
        drafted = _fill(single, drafting)[:, :, 0]
        drafted[:, 0] = 0.0
    return CostTable(grid, verify, drafted, None if follow is None else np.array([follow(rows) for rows in grid.rows]))


def _coarse_to_fine(shape: tuple[int, int, int]) -> list[tuple[int, int, int]]:
    """Cells in an order whose every beginning covers the grid about evenly: ends first, then middles."""
    ranks: list[dict[int, int]] = []
    for size in shape:
        order = [0, size - 1]
        gaps = [(0, size - 1)]
        while gaps:
            low, high = gaps.pop(0)
            middle = (low + high) // 2
            if middle not in (low, high):
                order.append(middle)
                gaps += [(low, middle), (middle, high)]
        ranks.append({index: rank for rank, index in enumerate(dict.fromkeys(order))})
    cells = [(a, b, c) for a in ranks[0] for b in ranks[1] for c in ranks[2]]

    def coarseness(cell: tuple[int, int, int]) -> tuple[int, int]:
        places = [rank[index] for rank, index in zip(ranks, cell, strict=True)]
        return max(places), sum(places)

    return sorted(cells, key=coarseness)


def _fill(grid: CostGrid, measured: dict[tuple[int, int, int], float]) -> Array:
    """The whole table from the cells that were measured; the rest from cells of the nearest context by tokens."""
    table = np.zeros(grid.shape)
    depths = sorted({cell[2] for cell in measured})
    for depth in range(grid.shape[2]):
        nearest = min(depths, key=lambda other: (abs(other - depth), other))
        by_tokens: dict[int, list[float]] = {}
        for (row, column, at), ms in measured.items():
            if at == nearest:
                by_tokens.setdefault(grid.rows[row] * (1 + grid.drafts[column]), []).append(ms)
        tokens = sorted(by_tokens)
        costs = [statistics.mean(by_tokens[count]) for count in tokens]
        for row, rows in enumerate(grid.rows):
            for column, drafts in enumerate(grid.drafts):
                estimate = float(np.interp(rows * (1 + drafts), tokens, costs))
                table[row, column, depth] = measured.get((row, column, depth), estimate)
    return table
