"""The experiment beside the server: it is fed with what requests showed, and its weights become the arms'."""

from __future__ import annotations

import asyncio
import logging
import sqlite3
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

from server.api.experiment_metrics import ExperimentMetrics
from server.api.experiment_terms import agree
from server.api.generation import Part
from server.api.observing import observation
from server.config import ConfigError, ServerConfig, with_arms
from server.routing.assignment import Assignment
from server.routing.conductor import LOOK_EVERY_S, Conductor
from server.routing.evidence.observation import Observation, key_number
from server.routing.experiment import Action, State
from server.routing.ledger import Ledger
from server.routing.plan import Plan, plan_of
from server.routing.verdict import write_verdict

if TYPE_CHECKING:
    from server.api.state import ServerState

logger = logging.getLogger(__name__)

LOOK_SHARE = 0.01
"""Of an API process's time: looks at much evidence are rarer than LOOK_EVERY_S."""


class ExperimentLike(Protocol):
    """The experiment as an API process sees it, wherever its state is."""

    async def told(self) -> list[dict[str, Any]]:
        """Of `/v1/experiments`."""

    async def decisions(self) -> list[dict[str, Any]]:
        """Every decision with its evidence."""

    async def asked(self, action: Action, actor: str) -> str | None:
        """Does what an operator asks for; what is wrong with it, None: it was done."""


class Watch:
    """What this API process saw of the arms that are compared, until somebody takes it."""

    def __init__(self, plan: Plan, clock: Callable[[], float] = time.time) -> None:
        self.arms = (plan.candidate, plan.baseline)
        self._clock = clock
        self._seen: dict[str, list[Observation]] = {name: [] for name in self.arms}

    def note(self, arm: str, key: str, running: int, parts: Sequence[Part]) -> None:
        """A request that was assigned to one of the arms has ended."""
        seen = observation(key, self._clock(), running, parts)
        if seen is not None:
            self._seen[arm].append(seen)

    def refused(self, arm: str, key: str) -> None:
        """One of the arms had no room for a request that was assigned to it."""
        self._seen[arm].append(Observation(key_number(key), self._clock(), error=True))

    def take(self) -> dict[str, list[Observation]]:
        """What was seen since the last time, by arm."""
        taken, self._seen = self._seen, {name: [] for name in self.arms}
        return {name: seen for name, seen in taken.items() if seen}


class Experiment:
    """The conductor on the event loop. `not_ready` says why candidate or baseline do not serve, by arm, `restarts` how
    often the candidate's engine was restarted, `follow` makes everybody assign keys as it is told. `artifact` is where
    the candidate's optimised model lies (None: it has none), `on_over` hears of a verdict after which engines stop:
    whether the candidate was promoted."""

    def __init__(
        self,
        config: ServerConfig,
        *,
        not_ready: Callable[[], Mapping[str, str]],
        restarts: Callable[[], int],
        follow: Callable[[Assignment], None],
        say: Callable[[str], None],
        artifact: Callable[[], Path | None] = lambda: None,
        on_over: Callable[[bool], None] = lambda promoted: None,
    ) -> None:
        assert config.experiment is not None
        plan = plan_of(config.experiment)
        self._ledger = Ledger(Path(config.experiment_ledger).expanduser())
        agree(self._ledger, config, plan)
        self.conductor = Conductor(plan, self._ledger)
        self._not_ready, self._restarts, self._follow, self._say = not_ready, restarts, follow, say
        self._artifact, self._on_over = artifact, on_over
        self._follow(self.conductor.assignment)
        if self.conductor.state is not None:
            say(f"Experiment {self.conductor.plan.name} goes on: {self._in_words()}")

    @classmethod
    def open(cls, config: ServerConfig, **joins: Any) -> Experiment:
        """As the constructor; ConfigError where the ledger cannot be used, or knows another experiment of that name."""
        try:
            return cls(config, **joins)
        except (OSError, sqlite3.Error) as error:
            raise ConfigError(f"experiment_ledger: {config.experiment_ledger!r} cannot be used: {error}") from error

    def take(self, arm: str, seen: Sequence[Observation]) -> None:
        """What an API process saw. What cannot be written down is left out, and said."""
        try:
            self.conductor.observe(arm, seen)
        except sqlite3.Error:
            logger.exception("observations of arm %s could not be written to the ledger", arm)

    async def run(self, watch: Watch | None = None) -> None:
        """Takes what `watch` saw, and looks, until it is cancelled. What goes wrong is logged, and it looks again."""
        took_s = 0.0
        while True:
            await asyncio.sleep(max(LOOK_EVERY_S, took_s / LOOK_SHARE))
            started = time.perf_counter()
            try:
                for arm, seen in ({} if watch is None else watch.take()).items():
                    self.take(arm, seen)
                self.look()
            except Exception:
                logger.exception("a look at the experiment failed; it goes on as it is")
            took_s = time.perf_counter() - started

    def look(self) -> None:
        """One look; an error of the ledger leaves everything as it was until the next."""
        before = self.conductor.state
        try:
            changed = self.conductor.tick(ready=not self._not_ready(), restarts=self._restarts())
        except sqlite3.Error:
            logger.exception("the ledger cannot be written: the experiment stays as it is")
            return
        self._after(changed, before)

    def act(self, action: Action, actor: str) -> bool:
        """What an operator asks for; whether anything changed. LookupError: it has not begun. sqlite3.Error."""
        before = self.conductor.state
        changed = self.conductor.act(action, actor)
        self._after(changed, before)
        return changed

    async def told(self) -> list[dict[str, Any]]:
        """See ExperimentLike."""
        report, why = self.conductor.report(), self._not_ready()
        if self.conductor.state is None and why:
            report["reason"] = "; ".join(f"arm {name}: {reason}" for name, reason in why.items())
        return [{**report, "not_ready": why}]

    async def decisions(self) -> list[dict[str, Any]]:
        """See ExperimentLike."""
        return self._ledger.events(self.conductor.plan.name)

    async def asked(self, action: Action, actor: str) -> str | None:
        """See ExperimentLike."""
        state, plan = self.conductor.state, self.conductor.plan
        if plan.retire and state is not None and state.over:
            return f"the experiment is over ({state.status.replace('_', ' ')}) and the other engines are stopped"
        try:
            done = self.act(action, actor)
        except LookupError as error:
            return str(error)
        except sqlite3.Error as error:
            logger.exception("the ledger cannot be written")
            return f"the ledger cannot be written: {error}"
        return None if done else f"an experiment that is {self.conductor.report()['status']} cannot do that"

    def close(self) -> None:
        """Closes the ledger."""
        self._ledger.close()

    def _after(self, changed: bool, before: object) -> None:
        if changed:
            self._follow(self.conductor.assignment)
        state, plan = self.conductor.state, self.conductor.plan
        if state is before or state is None:
            return
        self._say(f"Experiment {plan.name}: {self._in_words()}")
        if state.over:
            self._mark(state)
            if plan.retire:
                self._on_over(state.status == "promoted")

    def _mark(self, state: State) -> None:
        artifact, name = self._artifact(), self.conductor.plan.name
        if artifact is None:
            return
        try:
            write_verdict(artifact, status=state.status, experiment=name, reason=state.reason)
        except OSError:
            logger.exception("the verdict could not be written beside the artifact; the ledger has it")
        if state.status == "rolled_back":
            self._say(
                f"{artifact} is kept and marked as rolled back: it will not be tried again by itself. "
                f"`outpace artifacts retry {artifact.name}` lets the next start try it again"
            )

    def _in_words(self) -> str:
        state, shares = self.conductor.state, self.conductor.weights
        assert state is not None
        percent = ", ".join(f"{name} {share:g} %" for name, share in shares.items())
        return f"{state.status.replace('_', ' ')} ({state.reason or 'it begins'}); {percent}"


def experiment_of(
    state: ServerState, say: Callable[[str], None], on_over: Callable[[bool], None] = lambda promoted: None
) -> Experiment | None:
    """The experiment of the settings, where this process owns the engines; `state` knows of it from then on.

    Raises ConfigError where the ledger cannot be used.
    """
    config, arms = state.config, state.arms
    if config.experiment is None:
        return None
    state.watch = Watch(plan_of(config.experiment))
    plan = plan_of(config.experiment)
    compared = [arm for name in state.watch.arms if (arm := arms.named(name)) is not None]
    candidate = arms.named(plan.candidate)

    def follow(assignment: Assignment) -> None:
        arms.assign = assignment

    made = Experiment.open(
        config,
        not_ready=lambda: (
            {arm.name: why[1] for arm in compared if (why := arm.not_ready) is not None}
            if len(compared) == len(state.watch.arms)
            else {plan.candidate: "it is not served by this server"}
        ),
        restarts=lambda: 0 if candidate is None else candidate.engine.num_restarts,
        follow=follow,
        say=say,
        artifact=lambda: artifact_of(config, plan, "" if candidate is None else candidate.config.model),
        on_over=on_over,
    )
    state.experiment = made
    state.metrics.engine_registry.register(ExperimentMetrics(made.conductor.report))
    return made


def artifact_of(config: ServerConfig, plan: Plan, model: str) -> Path | None:
    """Where the candidate's optimised model lies, if it has one; `model` is what its engine was started with."""
    arm = next((arm for arm in config.arms if arm.name == plan.candidate), None)
    return Path(model) if arm is not None and model and model != arm.engine.model else None


def settled(config: ServerConfig, say: Callable[[str], None]) -> tuple[ServerConfig, str | None]:
    """Without the arms of an experiment that is over and whose plan says `retire`: a candidate that was promoted is
    what the server serves. With the recipe that it needs. A ledger that cannot be read changes nothing here. Raises
    ConfigError where the ledger knows another experiment of that name."""
    if config.experiment is None or not plan_of(config.experiment).retire:
        return config, None
    plan = plan_of(config.experiment)
    try:
        ledger = Ledger(Path(config.experiment_ledger).expanduser())
    except (OSError, sqlite3.Error):
        return config, None
    try:
        agree(ledger, config, plan)
        state = ledger.state(plan.name)
    except sqlite3.Error:
        return config, None
    finally:
        ledger.close()
    if state is None or not state.over:
        return config, None
    arms = {arm.name: arm for arm in config.arms}
    candidate = arms.pop(plan.candidate, None)
    arms.pop(plan.baseline, None)
    say(f"Experiment {plan.name} is over: {state.status.replace('_', ' ')} ({state.reason})")
    config = with_arms(config, tuple(arms.values()))
    if state.status == "promoted" and candidate is not None:
        return replace(config, engine=candidate.engine), candidate.recipe
    return config, None


@contextmanager
def conducted(experiment: Experiment | None, watch: Watch | None) -> Iterator[None]:
    """While the block runs, `experiment` is looked at; its ledger is closed after it."""
    if experiment is None:
        yield
        return
    task = asyncio.create_task(experiment.run(watch), name="experiment")
    try:
        yield
    finally:
        task.cancel()
        experiment.close()
