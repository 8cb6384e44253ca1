"""Drives one experiment: observations in, decisions to the ledger, and only then the weights out.

One process has it, the owner of experiment state; whoever serves hands it what it saw and follows its weights.
"""

from __future__ import annotations

import secrets
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict
from typing import Any

from server.routing.assignment import Assignment
from server.routing.evidence.evidence import Evidence
from server.routing.evidence.metrics import Finding
from server.routing.evidence.observation import Observation
from server.routing.experiment import Action, Event, Reading, State, act, start, step, weights
from server.routing.guards import RecentRequests
from server.routing.ledger import Ledger
from server.routing.plan import Plan

LOOK_EVERY_S = 1.0
"""How often what is known is looked at; always-valid intervals allow any number of looks."""


class Conductor:
    """`clock` is in seconds since the epoch: times go on after a restart. `salt` (None: drawn) is a new experiment's.

    An experiment that the ledger knows goes on where it was: same stage, same salt, same evidence. Errors of the ledger
    (sqlite3.Error) are the caller's; a decision that cannot be written does not take effect.
    """

    def __init__(
        self, plan: Plan, ledger: Ledger, clock: Callable[[], float] = time.time, salt: str | None = None
    ) -> None:
        self.plan = plan
        self._ledger = ledger
        self._clock = clock
        self._salt = salt
        self._counts = [0, 0]
        self._recent = {name: RecentRequests(plan.guards.window_s) for name in (plan.candidate, plan.baseline)}
        self._restarts_before: int | None = None
        self._findings: tuple[Finding, ...] = ()
        self._compared = False
        self.state: State | None = ledger.state(plan.name)
        self._evidence = Evidence(clock(), limit=plan.max_observations)
        if self.state is not None:
            self._evidence, *self._counts = ledger.restore(
                plan.name, self.state.started_s, plan.max_observations, len(plan.stages) - 1
            )
            self._findings = self._evidence.findings(clock(), plan.alpha)

    @property
    def weights(self) -> Mapping[str, float]:
        """Percent of the traffic by arm; all is the control's before the experiment has begun."""
        if self.state is None:
            return {self.plan.control: 100.0, self.plan.baseline: 0.0, self.plan.candidate: 0.0}
        return weights(self.plan, self.state)

    @property
    def salt(self) -> str:
        """That of the assignment."""
        return "" if self.state is None else self.state.salt

    @property
    def assignment(self) -> Assignment:
        """Which arm a key belongs to now."""
        return Assignment(dict(self.weights), self.salt)

    def observe(self, arm: str, seen: Sequence[Observation]) -> None:
        """Requests of the candidate or the baseline, in the order of their ends; others and late ones do not count.

        While one of the two does not serve there is nothing to compare the other with: its requests are the guard
        rails' alone, and so are the candidate's in the last stage.
        """
        if not seen or arm not in self._recent or self.state is None or self.state.over:
            return
        candidate = arm == self.plan.candidate
        if not self._compared:
            self._recent[arm].add(seen)
            return
        self._ledger.append_observations(self.plan.name, seen, candidate=candidate, stage=self.state.stage)
        if self.state.stage < len(self.plan.stages) - 1:
            self._evidence.add(seen, candidate=candidate, stage=self.state.stage)
        self._recent[arm].add(seen)
        self._counts[0 if candidate else 1] += len(seen)

    def tick(self, *, ready: bool, restarts: int) -> bool:
        """Looks at what is known; whether weights have changed. `ready`: candidate and baseline serve. `restarts`: of
        the candidate's engine, since this process began. An experiment begins when its arms are ready for the first
        time."""
        now = self._clock()
        self._compared = ready
        if self._restarts_before is None and ready:
            self._restarts_before = restarts
        if self.state is None:
            if ready:
                self._evidence = Evidence(now, limit=self.plan.max_observations)  # its time blocks begin here
                self._decide(*start(self.plan, self._salt or secrets.token_hex(8), now))
            return ready
        if self.state.over:
            return False
        before = self.weights
        self._findings = self._evidence.findings(now, self.plan.alpha)
        state, events = step(self.plan, self.state, self._reading(now, restarts), now)
        self._decide(state, *events)
        return self.weights != before

    def act(self, action: Action, actor: str) -> bool:
        """What an operator asks for; whether anything changed. LookupError: the experiment has not begun."""
        if self.state is None:
            raise LookupError("the experiment has not begun: its arms are not ready")
        now = self._clock()
        state, events = act(self.plan, self.state, action, self._reading(now, self._restarts_before or 0), now, actor)
        self._decide(state, *events)
        return bool(events)

    def report(self) -> dict[str, Any]:
        """What `/v1/experiments` tells of it; bounds that are not known are infinite."""
        plan, state = self.plan, self.state
        return {
            "name": plan.name,
            "status": "waiting" if state is None else state.status,
            "reason": "candidate and baseline are not ready yet" if state is None else state.reason,
            "stage": None if state is None else state.stage,
            "stages": [asdict(stage) for stage in plan.stages],
            "stage_started": None if state is None else state.stage_started_s,
            "started": None if state is None else state.started_s,
            "weights": dict(self.weights),
            "arms": {"control": plan.control, "baseline": plan.baseline, "candidate": plan.candidate},
            "goal": plan.goal,
            "primary": plan.primary,
            "alpha": plan.alpha,
            "num_candidate": self._counts[0],
            "num_baseline": self._counts[1],
            "evidence_full": self._evidence.full,
            "findings": [asdict(finding) for finding in self._findings],
            "tolerances": {finding.metric: plan.tolerance(finding.metric) for finding in self._findings},
        }

    def _reading(self, now: float, restarts: int) -> Reading:
        plan = self.plan
        return Reading(
            self._findings,
            self._counts[0],
            self._counts[1],
            self._recent[plan.candidate].window(now),
            self._recent[plan.baseline].window(now),
            max(0, restarts - (self._restarts_before or 0)),
        )

    def _decide(self, state: State, *events: Event) -> None:
        """The ledger first: what a restart would not know of must not take effect."""
        if events:
            self._ledger.append(self.plan.name, events)
        self.state = state
