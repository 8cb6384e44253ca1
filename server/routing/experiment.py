"""An experiment's way from its first percent to everyone or to nobody: a pure function of state, evidence and clock.

    running at stage 0 -> 1 -> … -> 100 % -> promoted   (min_samples, min_time and no harm; 100 % needs the goal)
        \\-> rolled back                                 (harm proven, a guard rail, or an operator)

At 100 % there is nobody to compare the candidate with: guard rails watch it for that stage's requests and time, if any.

Whoever drives it calls `step` every second or so, writes the events to the ledger, and only then applies `weights`.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, replace
from typing import Any, Literal

from server.routing.evidence.metrics import METRICS, Finding
from server.routing.guards import Window, violation
from server.routing.plan import Plan

Status = Literal["running", "paused", "promoted", "rolled_back"]
EventKind = Literal["start", "advance", "promote", "hold", "roll_back", "pause", "resume"]
Action = Literal["promote", "roll_back", "pause", "resume"]
ACTIONS: tuple[Action, ...] = ("promote", "roll_back", "pause", "resume")
_HARM = {metric.name: metric.harm for metric in METRICS}


@dataclass(frozen=True, slots=True)
class State:
    """Where an experiment is. Times are seconds of the clock that `step` is given, counts are requests until then.

    `salt` is the assignment's: the same keys are on the same arms for as long as the experiment lives.
    """

    status: Status
    stage: int
    salt: str
    started_s: float
    stage_started_s: float
    stage_candidate: int = 0
    stage_baseline: int = 0
    held: bool = False
    reason: str = ""

    @property
    def over(self) -> bool:
        """Whether there was a verdict."""
        return self.status in ("promoted", "rolled_back")


@dataclass(frozen=True, slots=True)
class Reading:
    """What is known at a moment: findings, requests of each arm since the start, their last minute, restarts."""

    findings: tuple[Finding, ...] = ()
    num_candidate: int = 0
    num_baseline: int = 0
    candidate: Window = field(default_factory=Window)
    baseline: Window = field(default_factory=Window)
    restarts: int = 0


@dataclass(frozen=True, slots=True)
class Event:
    """One decision: `state` after it, the weights (percent by arm) that it sets, why, and by whom (`""`: itself)."""

    kind: EventKind
    at_s: float
    state: State
    weights: Mapping[str, float]
    reason: str
    evidence: Mapping[str, Any]
    actor: str = ""


def weights(plan: Plan, state: State) -> dict[str, float]:
    """Percent of the traffic by arm. Candidate and baseline are equal until the candidate has it all, or nothing."""
    if state.status == "rolled_back":
        share = rival = 0.0
    elif state.status == "promoted":
        share, rival = 100.0, 0.0
    else:
        share = plan.stages[state.stage].share
        rival = 0.0 if state.stage == len(plan.stages) - 1 else share
    return {plan.control: 100.0 - share - rival, plan.baseline: rival, plan.candidate: share}


def start(plan: Plan, salt: str, now_s: float, actor: str = "") -> tuple[State, Event]:
    """A new experiment at its first stage."""
    state = State("running", 0, salt, now_s, now_s)
    return state, _event(plan, "start", state, f"stage of {plan.stages[0].share:g} %", Reading(), now_s, actor)


def step(plan: Plan, state: State, reading: Reading, now_s: float) -> tuple[State, tuple[Event, ...]]:
    """The state after what is known at `now_s`, and the event that says why if it changed. At most one step a call."""
    if state.over:
        return state, ()
    reason = violation(plan.guards, reading.candidate, reading.baseline, reading.restarts)
    reason = reason and f"guard rail, {reason}"
    alone = state.stage == len(plan.stages) - 1
    harm = reason or (None if alone else _harm(plan, reading))
    if harm is not None:
        return _decided(plan, "roll_back", replace(state, status="rolled_back", reason=harm), reading, now_s)
    if state.status == "paused":
        return state, ()
    waiting = _waiting(plan, state, reading, now_s)
    if waiting is None:
        return _advanced(plan, state, reading, now_s)
    if not state.held and now_s - state.stage_started_s >= plan.max_time_s:
        return _decided(plan, "hold", replace(state, held=True, reason=waiting), reading, now_s)
    return state, ()


def act(
    plan: Plan, state: State, action: Action, reading: Reading, now_s: float, actor: str
) -> tuple[State, tuple[Event, ...]]:
    """What an operator asks for. Nothing changes where it makes no sense: after a verdict only a roll-back does."""
    reason = f"asked for by {actor}"
    if action == "roll_back" and state.status != "rolled_back":
        after = replace(state, status="rolled_back", reason=reason)
    elif action == "promote" and not state.over:
        after = replace(state, status="promoted", stage=len(plan.stages) - 1, stage_started_s=now_s, reason=reason)
    elif action == "pause" and state.status == "running":
        after = replace(state, status="paused", reason=reason)
    elif action == "resume" and state.status == "paused":
        after = replace(state, status="running", reason=reason)
    else:
        return state, ()
    return after, (_event(plan, action, after, reason, reading, now_s, actor),)


def _advanced(plan: Plan, state: State, reading: Reading, now_s: float) -> tuple[State, tuple[Event, ...]]:
    """One stage on; behind the one that gives it everything, or with it if it asks for nothing, is the promotion."""
    end = len(plan.stages) - 1
    if state.stage == end:
        promoted = replace(state, status="promoted", held=False)
        return _decided(plan, "promote", promoted, reading, now_s)
    stage = state.stage + 1
    last = stage == end and not (plan.stages[end].min_samples or plan.stages[end].min_time_s)
    reason = f"no harm shown; stage of {plan.stages[stage].share:g} %"
    if stage == end:
        reason = _goal(plan, reading)[1]
    after = replace(
        state,
        status="promoted" if last else "running",
        stage=stage,
        stage_started_s=now_s,
        stage_candidate=reading.num_candidate,
        stage_baseline=reading.num_baseline,
        held=False,
        reason=reason,
    )
    return _decided(plan, "promote" if last else "advance", after, reading, now_s)


def _harm(plan: Plan, reading: Reading) -> str | None:
    """The first metric that is proven worse, and by more than its tolerance as far as one can tell."""
    for finding in reading.findings:
        if finding.claim == "worse" and abs(finding.estimate) > plan.tolerance(finding.metric):
            return f"{finding.metric} is worse: {_in_words(finding)}"
    return None


def _waiting(plan: Plan, state: State, reading: Reading, now_s: float) -> str | None:
    """What the stage still lacks; None: nothing."""
    stage, alone = plan.stages[state.stage], state.stage == len(plan.stages) - 1
    fewest = reading.num_candidate - state.stage_candidate
    if not alone:
        fewest = min(fewest, reading.num_baseline - state.stage_baseline)
    if fewest < stage.min_samples:
        return f"{fewest} of {stage.min_samples} requests"
    elapsed = now_s - state.stage_started_s
    if elapsed < stage.min_time_s:
        return f"{elapsed:.0f} of {stage.min_time_s:.0f} s"
    if alone or state.stage + 2 < len(plan.stages):
        return None
    reached, why = _goal(plan, reading)
    return None if reached else why


def _goal(plan: Plan, reading: Reading) -> tuple[bool, str]:
    """Whether the primary metric is what the plan wants it to be, and what it is."""
    finding = next((f for f in reading.findings if f.metric == plan.primary), None)
    if finding is None:
        return False, f"{plan.primary}: nothing is known"
    words = f"{plan.primary}: {_in_words(finding)}"
    if plan.goal == "improve":
        return finding.claim == "better", words
    worst = finding.upper if _HARM[plan.primary] == "higher" else -finding.lower
    return worst < plan.margin, words


def _in_words(finding: Finding) -> str:
    return (
        f"{finding.estimate:+.3g}, between {finding.lower:+.3g} and {finding.upper:+.3g} "
        f"({finding.num_candidate} against {finding.num_baseline})"
    )


def _decided(
    plan: Plan, kind: EventKind, state: State, reading: Reading, now_s: float
) -> tuple[State, tuple[Event, ...]]:
    return state, (_event(plan, kind, state, state.reason, reading, now_s),)


def _event(
    plan: Plan, kind: EventKind, state: State, reason: str, reading: Reading, now_s: float, actor: str = ""
) -> Event:
    return Event(kind, now_s, state, weights(plan, state), reason, asdict(reading), actor)
