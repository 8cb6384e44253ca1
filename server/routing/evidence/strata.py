"""Like with like: requests are compared with those that ran in the same stage beside as many others."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from server.routing.evidence.clusters import Clusters, effective_count
from server.routing.evidence.columns import Columns, Floats, Ints

MIN_STRATUM = 8
"""Observations that each arm has in a stratum; smaller ones are joined to their neighbour."""


@dataclass(frozen=True, slots=True)
class Cut:
    """The requests of one arm that have one number: `values`, `groups` (strata), `weights` (sum 1), [n] each."""

    values: Floats
    groups: Ints
    weights: Floats
    clusters: Clusters

    def centred(self, parts: Floats) -> tuple[float, Floats]:
        """The weighted mean of `parts` [n], and the weighted residuals [n] from each stratum's own mean."""
        counts = np.bincount(self.groups)
        means = np.bincount(self.groups, parts) / np.maximum(counts, 1)
        freedom = np.sqrt(counts / np.maximum(counts - 1, 1))
        residuals: Floats = self.weights * (parts - means[self.groups]) * freedom[self.groups]
        return float(self.weights @ parts), residuals


@dataclass(frozen=True, slots=True)
class Side:
    """One arm's columns and the time block of each request."""

    columns: Columns
    blocks: Ints


def cut(candidate: Side, baseline: Side, column: str) -> tuple[Cut, Cut] | None:
    """Both arms' requests that have the number `column`, standardised to the same strata. None where there are too few.

    A stratum's weight is n m / (n + m) of its two counts (Mantel and Haenszel 1959): most where both arms have most.
    """
    kept = [np.flatnonzero(~np.isnan(side.columns.values(column))) for side in (candidate, baseline)]
    if min(len(rows) for rows in kept) < MIN_STRATUM:
        return None
    strata = [side.columns.strata[rows] for side, rows in zip((candidate, baseline), kept, strict=True)]
    size = int(max(s.max() for s in strata)) + 1
    counts = np.stack([np.bincount(s, minlength=size) for s in strata])
    groups, joined = _join(counts)
    share = joined[0] * joined[1] / joined.sum(axis=0)
    share /= share.sum()
    sides = []
    for side, rows, stratum, count in zip((candidate, baseline), kept, strata, joined, strict=True):
        group = groups[stratum]
        weights = (share / count)[group]
        columns = side.columns
        keys, blocks, cells = columns.keys[rows], side.blocks[rows], columns.cells[rows]
        independent = min(effective_count(keys, weights), effective_count(blocks, weights))
        clusters = Clusters(keys, blocks, cells, independent)
        sides.append(Cut(columns.values(column)[rows], group, weights, clusters))
    return sides[0], sides[1]


def _join(counts: Ints) -> tuple[Ints, Floats]:
    """Group of each stratum [s] and the groups' counts [2, g]: neighbours joined until both arms have MIN_STRATUM."""
    groups = np.zeros(counts.shape[1], np.int64)
    group, held = 0, np.zeros(2, np.int64)
    for s in range(counts.shape[1]):
        groups[s] = group
        held += counts[:, s]
        if held.min() >= MIN_STRATUM:
            group, held = group + 1, np.zeros(2, np.int64)
    groups[groups == group] = group - 1  # what is left at the end
    joined = np.stack([np.bincount(groups, row) for row in counts])
    return groups, joined
