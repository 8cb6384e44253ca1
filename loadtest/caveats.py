"""What a reader must know before believing the numbers."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from loadtest.measure import Seen
from loadtest.tokens import CAVEATS

MAX_CPU_SHARE = 0.85
MAX_LAG_S = 0.010
FEW = 100
"""Fewer requests than this have no P99 worth the name."""


def warnings(runs: Sequence[Seen], way: str, limited: bool) -> list[str]:
    """`limited`: the client holds requests back on purpose, so that a late sending is not the generator's fault."""
    found = []
    health = [one for run in runs for one in run.health]
    busiest = max((one.cpu_share for one in health), default=0.0)
    if busiest > MAX_CPU_SHARE:
        found.append(
            f"generator-cpu: a generator process took {busiest:.0%} of a core, so latency may be its own; "
            "use more --processes"
        )
    lags = [lag for one in health for lag in one.lags]
    lag = float(np.percentile(lags, 99)) if lags else 0.0
    if lag > MAX_LAG_S:
        found.append(
            f"generator-lag: 1 % of the generator's own timers were late by {1e3 * lag:.0f} ms or more; "
            "use more --processes, or a machine that is less busy"
        )
    late = [record.sent - record.intended for run in runs for record in run.measured]
    lateness = float(np.percentile(late, 99)) if late and not limited else 0.0
    if lateness > MAX_LAG_S:
        found.append(
            f"late-sending: 1 % of requests were sent {1e3 * lateness:.0f} ms or more after they were meant to be"
        )
    if way in CAVEATS:
        found.append(CAVEATS[way])
    measured = sum(len(run.measured) for run in runs)
    if measured < FEW:
        found.append(
            f"few-requests: {measured} requests were measured; P99 of fewer than {FEW} is the slowest or close to it"
        )
    return found
