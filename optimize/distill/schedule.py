"""How far a training is, by the clock or by updates, and the learning rate there."""

from __future__ import annotations

import math
from dataclasses import dataclass

WARM_UP, WARM_UP_UPDATES = 0.03, 10
"""Share of the training, and fewest updates, until the learning rate is at its peak."""
FLOOR = 0.05
"""What is left of the learning rate at the end."""


@dataclass(frozen=True, slots=True)
class Schedule:
    """The length of a training: `steps` updates, or `minutes` of computing where that is None."""

    steps: int | None
    minutes: float | None

    def share(self, step: int, elapsed_s: float) -> float:
        """How much of the training is over after `step` updates and `elapsed_s` seconds; 1 or more: all of it."""
        if self.steps is not None:
            return step / self.steps
        assert self.minutes is not None
        return elapsed_s / (60.0 * self.minutes)


def learning_rate_factor(share: float, step: int = WARM_UP_UPDATES) -> float:
    """Linear warm-up, then a cosine down to FLOOR (Loshchilov and Hutter 2017, SGDR, without restarts).

    `step` is the number of updates before this one: a training of few, slow updates warms up by their number.
    """
    warmth = min(max(share, 1e-3) / WARM_UP, (step + 1) / WARM_UP_UPDATES)
    if warmth < 1.0:
        return warmth
    angle = math.pi * min(1.0, (share - WARM_UP) / (1.0 - WARM_UP))
    return FLOOR + (1.0 - FLOOR) * 0.5 * (1.0 + math.cos(angle))
