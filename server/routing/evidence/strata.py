"""Like with like: requests are compared with those that ran in the same stage beside as many others."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from server.routing.evidence.clusters import Clusters, clustered_variance, effective_count
from server.routing.evidence.columns import Columns, Floats, Ints

MIN_STRATUM = 8
"""Observations that each arm has in a stratum; smaller ones are joined to their neighbour."""


@dataclass(frozen=True, slots=True)
class Side:
    """One arm's columns and the time block of each request."""

    columns: Columns
    blocks: Ints


@dataclass(frozen=True, slots=True)
class Cut:
    """The requests of one arm that have one number: `values`, `groups` (strata), `weights` (sum 1), [n] each."""

    values: Floats
    groups: Ints
    weights: Floats


@dataclass(frozen=True, slots=True)
class Pair:
    """Both arms' requests. `clusters` are of the candidate's requests and then the baseline's, `share` [g] weights."""

    candidate: Cut
    baseline: Cut
    share: Floats
    clusters: Clusters

    def difference(self, ours: Floats, theirs: Floats) -> tuple[float, float]:
        """The difference of weighted means of `ours` [n] and `theirs` [m], and its clustered variance.

        Residuals are from the mean of *both* arms in a stratum and half the difference over all strata: those from an
        arm's own mean in a stratum would cancel over the few time blocks that it lies in, and with them what these
        differ by. So one degree of freedom is lost, not one a stratum.
        Blocks are shared by the arms, so what hits both at once cancels.
        """
        cuts = (self.candidate, self.baseline)
        means = [
            np.bincount(cut.groups, cut.weights * parts) / self.share
            for cut, parts in zip(cuts, (ours, theirs), strict=True)
        ]
        middle = (means[0] + means[1]) / 2
        difference = float(self.share @ (means[0] - means[1]))
        plus = self.candidate.weights * (ours - middle[self.candidate.groups] - difference / 2)
        minus = self.baseline.weights * (theirs - middle[self.baseline.groups] + difference / 2)
        return difference, clustered_variance(np.concatenate([plus, -minus]), self.clusters)


def pair(candidate: Side, baseline: Side, column: str) -> Pair | None:
    """Both arms' requests that have the number `column`, standardised to the same strata. None where there are too few.

    A stratum's weight is n m / (n + m) of its two counts (Mantel and Haenszel 1959): most where both arms have most.
    """
    sides = (candidate, baseline)
    kept = [np.flatnonzero(~np.isnan(side.columns.values(column))) for side in sides]
    if min(len(rows) for rows in kept) < MIN_STRATUM:
        return None
    strata = [side.columns.strata[rows] for side, rows in zip(sides, kept, strict=True)]
    size = int(max(s.max() for s in strata)) + 1
    groups, counts = _join(np.stack([np.bincount(s, minlength=size) for s in strata]))
    share = counts[0] * counts[1] / counts.sum(axis=0)
    share /= share.sum()
    cuts = []
    for side, rows, stratum, count in zip(sides, kept, strata, counts, strict=True):
        group = groups[stratum]
        cuts.append(Cut(side.columns.values(column)[rows], group, (share / count)[group]))
    return Pair(cuts[0], cuts[1], share, _clusters(sides, kept, cuts))


def _clusters(sides: tuple[Side, Side], kept: list[Ints], cuts: list[Cut]) -> Clusters:
    """Keys and cells of the arms are different ones; time blocks are the same."""
    keys = [side.columns.keys[rows] for side, rows in zip(sides, kept, strict=True)]
    cells = [side.columns.cells[rows] for side, rows in zip(sides, kept, strict=True)]
    blocks = [side.blocks[rows] for side, rows in zip(sides, kept, strict=True)]
    count = min(
        effective_count(ids, cut.weights) for kind in (keys, blocks) for ids, cut in zip(kind, cuts, strict=True)
    )
    return Clusters(
        np.concatenate([keys[0], keys[1] + sides[0].columns.num_keys]),
        np.concatenate(blocks),
        np.concatenate([cells[0], cells[1] + sides[0].columns.num_cells]),
        count,
    )


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
    joined: Floats = np.stack([np.bincount(groups, row.astype(np.float64)) for row in counts])
    return groups, joined
