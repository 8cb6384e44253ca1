"""One simulated experiment through the router's own evidence, guards and state machine."""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np
import numpy.typing as npt

from benchmarks.ab.traffic import Effect, Load, Population, Requests, arm_requests, burst_rate
from server.routing.evidence.evidence import Evidence
from server.routing.experiment import Reading, State, start, step
from server.routing.guards import Window
from server.routing.plan import Plan

EQUAL = Effect()
LOOK_S = 10.0
"""Seconds between looks at first; later a look every 2 % of the time gone by."""


@dataclass(frozen=True)
class Outcome:
    """`verdict` is the state's last status; the candidate had `num_candidate` requests until then, at `time_s`."""

    verdict: str
    reason: str
    time_s: float
    num_candidate: int
    stage: int


class _Arm:
    """An arm's requests of one stage, handed over as the clock passes them; what ended before is its past."""

    def __init__(self, requests: Requests, window_s: float, past: _Arm | None) -> None:
        self.requests = requests
        self.given = 0
        self.window_s = window_s
        self.past = past
        if past is not None:
            past.past = None

    def until(self, now_s: float) -> slice:
        """The requests that ended since the last call."""
        end = int(np.searchsorted(self.requests.finished, now_s))
        part = slice(self.given, max(end, self.given))
        self.given = part.stop
        return part

    def window(self, now_s: float) -> Window:
        """The last minute's requests."""
        error, values = self._recent(now_s)
        if self.past is not None:
            before = self.past._recent(now_s)
            error, values = np.r_[before[0], error], np.hstack([before[1], values])
        p99 = [float(np.quantile(v, 0.99, method="higher")) if len(v) else None for v in values[:, ~error]]
        return Window(len(error), int(error.sum()), p99[0], p99[1])

    def _recent(self, now_s: float) -> tuple[npt.NDArray[np.bool_], npt.NDArray[np.float64]]:
        first = int(np.searchsorted(self.requests.finished, now_s - self.window_s))
        part = slice(first, max(self.given, first))
        return self.requests.error[part], self.requests.values[[0, 2], part]


def simulate(plan: Plan, load: Load, effect: Effect, time_s: int, seed: int) -> Outcome:
    """Runs until the verdict, or `time_s` seconds. `effect` is the candidate's."""
    rng = np.random.default_rng(seed)
    people = Population(rng, load)
    evidence = Evidence(0.0, limit=plan.max_observations)
    state, _ = start(plan, "", 0.0)
    now, counts, stage = 0.0, [0, 0], -1
    arms: list[_Arm] = []
    effect = replace(effect)  # an object of its own
    while now < time_s and not state.over:
        if state.stage != stage:
            stage = state.stage
            bursts = burst_rate(rng, int(time_s - now) + 1)
            share = plan.stages[stage].share / 100
            made = [arm_requests(people, bursts, now, share, e, candidate=e is effect) for e in (effect, EQUAL)]
            past: list[_Arm] | list[None] = arms or [None, None]
            arms = [_Arm(r, plan.guards.window_s, p) for r, p in zip(made, past, strict=True)]
        now += max(LOOK_S, 0.02 * now)
        for side, arm in enumerate(arms):
            part = arm.until(now)
            counts[side] += part.stop - part.start
            _feed(evidence, arm.requests, part, stage, candidate=side == 0)
        findings = evidence.findings(now, plan.alpha)
        reading = Reading(findings, counts[0], counts[1], arms[0].window(now), arms[1].window(now))
        state, _ = step(plan, state, reading, now)
    return _outcome(state, now, counts[0])


def _outcome(state: State, now_s: float, num_candidate: int) -> Outcome:
    return Outcome(state.status, state.reason, now_s, num_candidate, state.stage)


def _feed(evidence: Evidence, requests: Requests, part: slice, stage: int, *, candidate: bool) -> None:
    if part.stop == part.start:
        return
    error, garbled = requests.error[part], requests.garbled[part]
    keys, finished = requests.keys[part], requests.finished[part]
    for flags, incidents in ((error, evidence.errors), (garbled & ~error, evidence.garbled)):
        for i in np.flatnonzero(flags):
            incidents.add(candidate=candidate, key=int(keys[i]), at_s=float(finished[i]))
    good = ~error
    columns = evidence.candidate if candidate else evidence.baseline
    columns.extend(
        keys[good].tolist(), finished[good], requests.running[part][good], requests.values[:, part][:, good], stage
    )
