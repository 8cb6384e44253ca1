"""Everything that an experiment has seen of its candidate and its baseline, and what follows from it."""

from __future__ import annotations

import math
from collections.abc import Sequence

from server.routing.evidence.clusters import time_blocks
from server.routing.evidence.columns import Columns
from server.routing.evidence.estimators import interval_of
from server.routing.evidence.incidents import Incidents
from server.routing.evidence.metrics import METRICS, SHARES, Finding, Metric, claim_of
from server.routing.evidence.observation import Observation
from server.routing.evidence.sequences import coin_interval
from server.routing.evidence.strata import Side, pair


class Evidence:
    """Collects observations of both arms from `start_s` on. `limit`: observations an arm, after which evidence stands.

    Only requests that were assigned by their key belong here, and only while both arms are ready: not those that a
    header sent to an arm, nor those that fell back to the control.
    """

    def __init__(self, start_s: float, *, limit: int = 50_000) -> None:
        self.start_s = start_s
        self.candidate = Columns(limit)
        self.baseline = Columns(limit)
        self.errors = Incidents()
        self.garbled = Incidents()

    def add(self, seen: Sequence[Observation], *, candidate: bool, stage: int) -> None:
        """Notes requests of one arm that ended during `stage`, in the order in which they ended."""
        good = []
        for one in seen:
            if one.error:
                self.errors.add(candidate=candidate, key=one.key, at_s=one.finished_s)
            else:
                good.append(one)
                if one.garbled:
                    self.garbled.add(candidate=candidate, key=one.key, at_s=one.finished_s)
        if good:
            (self.candidate if candidate else self.baseline).add(good, stage)

    @property
    def full(self) -> bool:
        """Whether requests that end now change nothing but the counts of incidents."""
        return self.candidate.full or self.baseline.full

    def findings(self, now_s: float, alpha: float) -> tuple[Finding, ...]:
        """What every metric says by now, at `alpha` / SHARES each."""
        level = alpha / SHARES
        sides = tuple(
            Side(columns, time_blocks(columns.times, self.start_s)) for columns in (self.candidate, self.baseline)
        )
        return tuple(
            self._incidents(metric, now_s, level)
            if metric.estimator == "incidents"
            else _measured(metric, sides[0], sides[1], level)
            for metric in METRICS
        )

    def _incidents(self, metric: Metric, now_s: float, level: float) -> Finding:
        seen = self.errors if metric.name == "errors" else self.garbled
        seen.settle(now_s)
        ours, theirs = seen.candidate, seen.baseline
        low, high = coin_interval(ours, theirs, level)
        estimate = ours / (ours + theirs) - 0.5 if ours + theirs else math.nan
        lower, upper = low - 0.5, high - 0.5
        claim = claim_of(metric.harm, lower, upper)
        return Finding(metric.name, claim, estimate, lower, upper, level, ours, theirs, float(ours + theirs))


def _measured(metric: Metric, candidate: Side, baseline: Side, level: float) -> Finding:
    both = pair(candidate, baseline, metric.column)
    if both is None:
        return Finding(metric.name, "undecided", math.nan, -math.inf, math.inf, level, 0, 0, 0.0)
    estimate, lower, upper = interval_of(both, metric, level)
    counts = len(both.candidate.values), len(both.baseline.values)
    claim = claim_of(metric.harm, lower, upper)
    return Finding(metric.name, claim, estimate, lower, upper, level, *counts, both.clusters.count)
