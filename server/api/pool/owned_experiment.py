"""The experiment where its state is: in the owner, for all workers."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Mapping

import orjson

from server.api.experiment import Experiment, artifact_of
from server.api.pool import messages as m
from server.config import ServerConfig
from server.engine.supervisor import Supervisor
from server.routing.plan import plan_of

Tell = Callable[[m.ToWorker, bytes | None], None]
"""Sends a message to one worker, or to all (None)."""


class OwnedExperiment:
    """`experiment` is None where there is none. Raises ConfigError where the ledger cannot be used."""

    def __init__(
        self,
        config: ServerConfig,
        engines: Mapping[str, Supervisor],
        tell: Tell,
        say: Callable[[str], None],
        on_over: Callable[[bool], None],
    ) -> None:
        self._tell = tell
        self._answering: set[asyncio.Future[None]] = set()
        self.experiment: Experiment | None = None
        if config.experiment is None:
            return
        plan = plan_of(config.experiment)
        names = (plan.candidate, plan.baseline)
        compared = {name: engines[name] for name in names if name in engines}  # they leave after the verdict
        candidate = compared.get(plan.candidate)
        self.experiment = Experiment.open(
            config,
            not_ready=lambda: {
                name: "it is not served by this server"
                if name not in compared
                else compared[name].failure or "its engine is not ready yet"
                for name in names
                if name not in compared or not compared[name].ready
            },
            restarts=lambda: 0 if candidate is None else candidate.num_restarts,
            follow=lambda assignment: tell(m.Weights(dict(assignment.weights), assignment.salt), None),
            say=say,
            artifact=lambda: artifact_of(config, plan, "" if candidate is None else candidate.config.model),
            on_over=on_over,
        )

    def greet(self, identity: bytes) -> None:
        """A worker is there: it learns who gets what."""
        if self.experiment is not None:
            assignment = self.experiment.conductor.assignment
            self._tell(m.Weights(dict(assignment.weights), assignment.salt), identity)

    def handle(self, identity: bytes, message: m.Observed | m.Act | m.Scrape) -> None:
        """What a worker saw, or asks."""
        if isinstance(message, m.Observed):
            if self.experiment is not None:
                self.experiment.take(message.arm, message.seen)
            return
        answering = asyncio.ensure_future(self._answer(identity, message))
        self._answering.add(answering)
        answering.add_done_callback(self._answering.discard)

    async def _answer(self, identity: bytes, asked: m.Act | m.Scrape) -> None:
        experiment = self.experiment
        assert experiment is not None
        if isinstance(asked, m.Act):
            problem = await experiment.asked(asked.action, asked.actor)
            self._tell(m.Acted(asked.number, problem), identity)
            return
        told = experiment.told() if asked.what == "experiments" else experiment.decisions()
        self._tell(m.Scraped(asked.number, orjson.dumps(await told)), identity)
