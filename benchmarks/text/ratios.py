"""The ratio of two ways' medians with its uncertainty, and what it says of a target."""

from __future__ import annotations

import random
import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

NUM_RESAMPLES = 2000
CONFIDENCE = 0.95
_SEED = 20261123

Verdict = Literal["met", "missed", "not shown"]


@dataclass(frozen=True)
class Ratio:
    """`value` is the ratio of medians; `low` and `high` are the ends of its bootstrap interval."""

    value: float
    low: float
    high: float

    def verdict(self, target: float) -> Verdict:
        """Whether at least `target` is reached: for certain, certainly not, or not to be said by these rounds."""
        if self.low >= target:
            return "met"
        return "missed" if self.high < target else "not shown"


def ratio_of_medians(ours: Sequence[float], theirs: Sequence[float]) -> Ratio:
    """Both have one value a round. Whole rounds are drawn, since what disturbs one way of a round may disturb the next
    (paired percentile bootstrap: Davison and Hinkley, 1997, sections 2.4 and 5.3). Raises ValueError for unequal or no
    rounds."""
    if len(ours) != len(theirs) or not ours:
        raise ValueError(f"rounds: {len(ours)} and {len(theirs)} are not valid; use as many of both, at least one")
    draw, rounds = random.Random(_SEED), range(len(ours))
    found: list[float] = []
    for _ in range(NUM_RESAMPLES):
        chosen = draw.choices(rounds, k=len(rounds))
        found.append(statistics.median(ours[i] for i in chosen) / statistics.median(theirs[i] for i in chosen))
    found.sort()
    tail = round((1.0 - CONFIDENCE) / 2 * NUM_RESAMPLES)
    return Ratio(statistics.median(ours) / statistics.median(theirs), found[tail], found[-1 - tail])
