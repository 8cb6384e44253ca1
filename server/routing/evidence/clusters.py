"""How uncertain a weighted sum of requests is when requests of one key, and requests of one time, belong together."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from server.routing.evidence.columns import CELL_S, Floats, Ints

MAX_BLOCKS = 40
"""Time blocks double in length when there would be more: so they outgrow any burst that is short against the run."""
MIN_BLOCK_CELLS = 4
"""Cells in the shortest block."""


@dataclass(frozen=True, slots=True)
class Clusters:
    """`keys`, `blocks`, `cells`: [n] cluster numbers of requests; `count`: how many carry the weight."""

    keys: Ints
    blocks: Ints
    cells: Ints
    count: float


def time_blocks(times: Floats, start_s: float) -> Ints:
    """[n] numbers of the blocks that `times` (seconds, from `start_s`) lie in: MAX_BLOCKS / 2 to MAX_BLOCKS of them.

    Blocks are CELL_S * 2^j long, so a cell lies in one block whatever j (batch means with batches that grow:
    Steiger et al., "ASAP3", ACM TOMACS 2005).
    """
    cells = np.floor(times / CELL_S).astype(np.int64) - int(start_s // CELL_S)
    size = MIN_BLOCK_CELLS
    while len(cells) and cells.max() // size >= MAX_BLOCKS:
        size *= 2
    blocks: Ints = np.maximum(cells // size, 0)
    return blocks


def effective_count(ids: Ints, weights: Floats) -> float:
    """Number of equal clusters that would be as uneven as these: (sum w)^2 / sum w^2 of the clusters' weights."""
    sums = np.bincount(ids, weights)
    return float(sums.sum() ** 2 / np.square(sums).sum())


def clustered_variance(residuals: Floats, clusters: Clusters) -> float:
    """Variance of `residuals.sum()`, residuals being centred parts of an estimate.

    Two-way clustering by key and by time block (Cameron, Gelbach and Miller, "Robust inference with multiway
    clustering", JBES 2011): keys + blocks - cells, each the sum of squares of cluster sums; never below any of them.
    A block's products with the next are added where they are positive: queues outlast blocks.
    """
    sums = [np.bincount(ids, residuals) for ids in (clusters.keys, clusters.blocks, clusters.cells)]
    by_key, by_block, by_cell = (float(part @ part) for part in sums)
    blocks = sums[1]
    by_block += max(0.0, 2 * float(blocks[1:] @ blocks[:-1]))  # what one block leaves to the next
    return max(by_key + by_block - by_cell, by_key, by_block, by_cell)
