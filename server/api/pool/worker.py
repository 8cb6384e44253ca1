"""`python -m server.api.pool.worker`: one of several API processes on the same port.

Its assignment arrives as JSON on standard input. What is the whole server's (engine, keys, merged metrics, when to end)
it hears from the owner.
"""

from __future__ import annotations

import asyncio
import logging
import sys
from collections.abc import Callable, Sequence
from functools import partial
from itertools import count
from typing import Any

import msgspec
import orjson

from server.api import sockets
from server.api.access.control import AccessControl
from server.api.access.counters import SharedCounts
from server.api.access.keys import KeyTable
from server.api.access.ledger import Ledger
from server.api.access.limits import RateLimiter
from server.api.arm import Arm
from server.api.arms import Arms
from server.api.conclusion import conclude, stop
from server.api.event_loop import loop_factory
from server.api.experiment import Watch
from server.api.front import Front
from server.api.lifecycle import on_daemon_thread
from server.api.load_text import load_text
from server.api.params import Limits
from server.api.pool import messages as m
from server.api.pool.channel import WorkerChannel
from server.api.pool.remote_engine import RemoteEngine
from server.api.pool.remote_experiment import RemoteExperiment
from server.api.replays import Replays, pairs_of
from server.api.state import ServerState
from server.config import ConfigError
from server.engine.child import belong_to_parent
from server.routing.assignment import Assignment
from server.routing.conductor import LOOK_EVERY_S
from server.routing.plan import plan_of
from server.routing.replay.comparison import Comparison, Dropped
from server.telemetry.metrics import Metrics
from server.telemetry.tracing import Tracing

logger = logging.getLogger(__name__)

SNAPSHOT_S = 2.0
"""How often the owner gets this worker's metrics unasked: what a killed worker counted since then is lost."""
ANSWER_TIMEOUT_S = 5.0


def main() -> int:
    """Exit codes: 0 asked to end, 1 could not serve (the owner was told why)."""
    belong_to_parent()
    assignment = msgspec.json.decode(sys.stdin.buffer.read(), type=m.Assignment)
    level = assignment.config.log_level.upper()
    logging.basicConfig(level=level, format="%(asctime)s %(levelname)s %(name)s: %(message)s")
    with asyncio.Runner(loop_factory=loop_factory()) as runner:
        return runner.run(Worker(assignment).run())


class Worker:
    """Serves until the owner says `Quit`."""

    def __init__(self, assignment: m.Assignment) -> None:
        self._assignment = assignment
        self._front: Front | None = None
        self._asked: dict[int, asyncio.Future[Any]] = {}
        self._numbers = count(1)

    async def run(self) -> int:
        a, config = self._assignment, self._assignment.config
        self._ended: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self._engines = {arm.name: RemoteEngine(a.identity) for arm in config.all_arms}
        metrics = Metrics(a.version, is_owner=False)  # the owner knows names and engines
        arms = [
            Arm(
                arm.name,
                arm.engine,
                self._engines[arm.name],
                config.served_model_name or arm.engine.model,
                metrics.clock,
                SharedCounts(counts, config.api_workers, a.index),
            )
            for arm, counts in zip(config.all_arms, a.counts, strict=True)
        ]
        limiter = RateLimiter(Ledger(a.ledger, config.api_workers, a.index))
        self._state = state = ServerState(
            config,
            Arms.of_config(config, arms),
            metrics,
            a.version,
            limits=Limits(max_body_bytes=config.max_body_bytes),
            # Until the owner has sent the keys nobody is let in.
            access=AccessControl(None if config.api_keys is None else KeyTable(), limiter),
            scrape=lambda: self._ask(partial(m.Scrape, what="metrics")),
            stats=lambda: self._ask(partial(m.Scrape, what="stats")),
            reload=self._reload,
            tracing=Tracing.from_settings(config.otel_endpoint, a.version),
        )
        state.share = self._share
        if config.experiment is not None:
            state.watch, state.experiment = Watch(plan_of(config.experiment)), RemoteExperiment(self._ask)
        if pairs_of(config):
            state.replays = Replays(config, state.arms, self._compared)
            state.comparisons = self._comparisons
        self._channel = WorkerChannel(a.control, a.identity, self._handle)
        try:
            return await self._serve(state)
        finally:
            self._channel.close()

    async def _serve(self, state: ServerState) -> int:
        try:
            front = self._front = Front(state)
            if not self._assignment.replaces:
                await self._listen(front)
            name = await _load(state.control)
        except (ConfigError, OSError, ValueError) as error:
            self._channel.send(m.Failed(str(error)))
            return 1
        self._channel.send(m.Hello(name))
        if self._assignment.replaces:
            await self._engines[state.control.name].wait_ready()
            await self._listen(front)
        engines = self._engines.values()
        tasks = [
            asyncio.create_task(self._report()),
            asyncio.create_task(self._observe()),
            asyncio.create_task(_load_others(state.arms.every[1:])),
        ]
        try:
            broken = {engine.broken for engine in engines}
            await asyncio.wait({self._ended, *broken}, return_when=asyncio.FIRST_COMPLETED)
        finally:
            for task in tasks:
                task.cancel()
        errors = [engine.broken.exception() for engine in engines if engine.broken.done()]
        if errors:
            self._channel.send(m.Failed(f"a message from the engine could not be handled: {errors[0]}"))
        for engine in engines:
            await engine.close()
        await front.close()
        self._channel.send(m.Snapshot(0, *state.metrics.measured()))
        return 1 if errors else 0

    async def _listen(self, front: Front) -> None:
        config = self._assignment.config
        await front.listen(sockets.bind(config.host, config.port, shared=True))

    # -- what the owner says -----------------------------------------------------------------------------------

    def _handle(self, message: m.ToWorker) -> None:
        match message:
            case m.EngineState():
                self._engines[message.arm].apply(message)
            case m.Stats():
                self._engines[message.arm].apply_stats(message.stats)
            case m.Keys():
                self._state.access.install(message.table)
            case m.Reload():
                if self._front is not None:  # else it will read the new files when it begins
                    self._front.reload()
            case m.Collect():
                self._channel.send(m.Snapshot(message.number, *self._state.metrics.measured()))
            case m.Weights() | m.Concluded():
                self._follow(message)
            case m.Scraped() | m.Reloaded() | m.Acted():
                self._answered(message)
            case m.Drain():
                self._state.draining = True
                self._draining = asyncio.ensure_future(self._say_when_idle())
            case m.Quit():
                if not self._ended.done():
                    self._ended.set_result(None)

    def _follow(self, message: m.Weights | m.Concluded) -> None:
        """The experiment has decided. After its end engines are known by the arms that they are now."""
        state, engines = self._state, self._engines
        if isinstance(message, m.Weights):
            state.arms.assign = Assignment(message.weights, message.salt)
            return
        assert state.config.experiment is not None
        plan = plan_of(state.config.experiment)
        candidate = state.arms.named(plan.candidate)
        if candidate is None:  # it was told before
            return
        leaving = conclude(state, plan, promoted=message.promoted)
        winner, _ = engines.pop(plan.candidate), engines.pop(plan.baseline)
        if message.promoted:
            engines[state.control.name] = winner
            if candidate.text is None:
                state.control.text = None
                self._loading = asyncio.ensure_future(_load_others([state.control]))
        self._stopping = asyncio.ensure_future(stop(leaving))

    async def _say_when_idle(self) -> None:
        if self._state.replays is not None:
            await self._state.replays.close()
        await self._state.idle.wait()
        for engine in self._engines.values():
            await engine.line.wait_idle()
        self._channel.send(m.Idle())

    # -- what is asked of the owner ----------------------------------------------------------------------------

    async def _report(self) -> None:
        while True:
            await asyncio.sleep(SNAPSHOT_S)
            self._channel.send(m.Snapshot(0, *self._state.metrics.measured()))

    async def _observe(self) -> None:
        """What requests of an experiment showed goes to the owner."""
        while self._state.watch is not None:
            await asyncio.sleep(LOOK_EVERY_S)
            for arm, seen in self._state.watch.take().items():
                self._channel.send(m.Observed(arm, seen))

    def _compared(self, found: Comparison | Dropped) -> None:
        self._channel.send(m.Compared(dropped=found) if isinstance(found, Dropped) else m.Compared(found))

    async def _comparisons(self) -> dict[str, Any]:
        told: dict[str, Any] = orjson.loads(await self._ask(partial(m.Scrape, what="shadow")))
        return told

    async def _reload(self) -> Sequence[str]:
        """The owner reads the key file and tells every worker."""
        problems: list[str] = await self._ask(m.ReloadKeys)
        return problems

    async def _share(self, weights: dict[str, float]) -> None:
        """The owner tells every worker, this one before it answers."""
        await self._ask(partial(m.Share, weights=weights))

    async def _ask(self, question: Callable[[int], m.Scrape | m.ReloadKeys | m.Act | m.Share]) -> Any:
        """Raises TimeoutError where the owner does not answer."""
        number = next(self._numbers)
        future = self._asked[number] = asyncio.get_running_loop().create_future()
        self._channel.send(question(number))
        try:
            return await asyncio.wait_for(future, ANSWER_TIMEOUT_S)
        finally:
            self._asked.pop(number, None)

    def _answered(self, message: m.Scraped | m.Reloaded | m.Acted) -> None:
        answer: Any
        match message:
            case m.Scraped():
                answer = message.body
            case m.Reloaded():
                answer = message.problems
            case m.Acted():
                answer = message.problem
        waiting = self._asked.get(message.number)
        if waiting is not None and not waiting.done():
            waiting.set_result(answer)


async def _load(arm: Arm) -> str:
    """The arm's text layer; its model's short name. Raises ValueError with what is wrong with the model."""
    arm.text, name = await on_daemon_thread(lambda: load_text(arm.config.model))
    if arm.model_name == arm.config.model:
        arm.model_name = name
    return name


async def _load_others(arms: Sequence[Arm]) -> None:
    for arm in arms:
        try:
            await _load(arm)
        except ValueError as error:
            arm.progress = str(error)
            logger.error("arm %s does not serve: %s", arm.name, error)


if __name__ == "__main__":
    sys.exit(main())
