"""The owner of several API workers: it holds the port, the engine's life, the keys and the merged metrics.

owner ──supervises──► engines ◄──── one line a worker ──────┐
  └────supervises──► worker 0 … N-1 (HTTP, SO_REUSEPORT) ──┘
"""

from __future__ import annotations

import asyncio
import logging
import shutil
import tempfile
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import orjson

from server.api import sockets
from server.api.access.control import AccessControl
from server.api.access.counters import SharedCounts
from server.api.access.keys import KeyFileError
from server.api.access.ledger import Ledger
from server.api.access.tls import TlsContext
from server.api.banner import banner
from server.api.builds import Builds
from server.api.conclusion import told
from server.api.experiment import conducted
from server.api.experiment_metrics import ExperimentMetrics
from server.api.lifecycle import Say, Signals, bound_or_start_error, farewell, first_of, until_stopped
from server.api.pool import messages as m
from server.api.pool.channel import OwnerChannel
from server.api.pool.conclusion import conclude_engines, concluded, stop
from server.api.pool.member import Member
from server.api.pool.metrics import PoolMetrics
from server.api.pool.owned_experiment import OwnedExperiment
from server.api.replay_metrics import ReplayMetrics
from server.api.replays import pairs_of
from server.api.starting import ArmStarts, StartError, pending
from server.config import CONTROL, ConfigError, EngineConfig, ServerConfig
from server.engine.errors import EngineUnavailable
from server.engine.messages import EngineInfo, EngineStats
from server.engine.supervisor import ENGINE_PROGRAM, Supervisor
from server.routing.plan import plan_of
from server.routing.replay.book import Book
from server.telemetry.metrics import Metrics
from server.telemetry.report import Report
from server.telemetry.tracing import Tracing

logger = logging.getLogger(__name__)

_WORKERS_CLOSE_S = 4.0


class Pool:
    """Runs until a signal. Raises StartError."""

    def __init__(
        self,
        config: ServerConfig,
        version: str,
        say: Say,
        program: Sequence[str] = ENGINE_PROGRAM,
        builds: Builds | None = None,
    ) -> None:
        self._config = config
        self._builds = builds
        self._version = version
        self._say = say
        self._supervisors = {arm.name: Supervisor(arm.engine, b"owner", program) for arm in config.all_arms}
        for name, supervisor in self._supervisors.items():
            self._follow(name, supervisor)
        self._signals = Signals(lambda: None, self._on_reload)
        self._members: list[Member] = []
        self._by_identity: dict[bytes, Member] = {}
        self._idle = asyncio.Event()
        self._draining = False
        self._closing = False
        self._leaving: list[Supervisor] = []
        self._conclusion: m.Concluded | None = None
        self._weights: m.Weights | None = None
        try:
            self._access = AccessControl.from_file(config.api_keys)
            TlsContext.from_settings(config.tls_certificate, config.tls_key)  # what is wrong is told before workers are
            tracing = Tracing.from_settings(config.otel_endpoint, version)
            if tracing is not None:  # the workers make their own
                tracing.close()
        except (KeyFileError, ConfigError) as error:
            raise StartError(str(error)) from error
        own = Metrics(
            version,
            served_model_name=config.served_model_name,
            aliases=config.metric_aliases,
            price_per_hour=config.price_per_hour,
        )
        self._metrics = PoolMetrics(own, self._ask_for_snapshots)
        for name, supervisor in self._supervisors.items():
            if name not in pending(config):
                own.watch_engine(name, supervisor)
        self._book = Book(pairs_of(config))
        if self._book.tallies:
            own.engine_registry.register(ReplayMetrics(self._book))
        try:
            self._experiment = OwnedExperiment(config, self._supervisors, self._tell, say, self._conclude)
            if self._experiment.experiment is not None:
                own.engine_registry.register(ExperimentMetrics(self._experiment.experiment.conductor.report))
        except ConfigError as error:
            raise StartError(str(error)) from error

    async def run(self) -> None:
        """Serves until stopped."""
        config = self._config
        held = bound_or_start_error(lambda: sockets.reserve(config.host, config.port))
        port = sockets.port_of(held[0])
        self._url = sockets.url_of(config.host, port, tls=config.tls_certificate is not None)
        directory = Path(tempfile.mkdtemp(prefix="outpace-pool-"))
        try:
            self._open(directory, port)
            if await until_stopped(self._start(), self._signals.stop):
                with conducted(self._experiment.experiment, None):
                    await until_stopped(self._start_others(), self._signals.stop)
                    await self._signals.stop.wait()
                    await self._drain()
        finally:
            await self._close()
            self._channel.close()
            for holder in held:
                holder.close()
            shutil.rmtree(directory, ignore_errors=True)

    def reload(self) -> list[str]:
        """What SIGHUP does. One line for each thing that stayed as it was because it is wrong."""
        config = self._config
        problem = self._access.reload()
        if problem is None:
            self._tell_all(m.Keys(self._access.table))
        self._tell_all(m.Reload())
        problems = [] if problem is None else [problem]
        try:  # the workers read it themselves; whether they can is found out here
            TlsContext.from_settings(config.tls_certificate, config.tls_key)
        except ConfigError as error:
            problems.append(str(error))
        return problems

    def _on_reload(self) -> None:
        self.reload()  # what is wrong is in the log

    # -- start -------------------------------------------------------------------------------------------------

    def _open(self, directory: Path, port: int) -> None:
        config, num_workers = self._config, self._config.api_workers
        control, ledger = str(directory / "control.sock"), directory / "ledger"
        Ledger.create(ledger, num_workers)
        counts = self._count_files = [str(directory / f"counts-{index}") for index in range(len(config.all_arms))]
        for path in counts:
            SharedCounts.create(path, num_workers)
        self._counts = [SharedCounts(path, num_workers, 0) for path in counts]
        self._channel = OwnerChannel(control, self._handle)
        for index in range(num_workers):
            template = m.Assignment(_on_port(config, port), self._version, index, b"", control, str(ledger), counts)
            self._members.append(Member(template, self._on_spawn, self._on_death))

    async def _start(self) -> None:
        self._say(f"Loading {self._config.engine.model}; {self._url}/ready says when it serves")
        control = self._supervisors[CONTROL]
        await control.start()
        for member in self._members:
            member.start()
        try:
            info = await control.wait_ready()
        except EngineUnavailable as error:
            raise StartError(f"the engine failed to start: {error}") from error
        for member in self._members:
            await member.wait_ready()
        name = self._config.served_model_name or self._members[0].model_name
        self._say(banner(self._config, info, name, self._url))
        self._say(f"  {len(self._members)} API workers")

    async def _start_others(self) -> None:
        """One that does not start leaves the others serving."""

        def failed(name: str, reason: str) -> None:
            supervisor = self._supervisors[name]
            supervisor.failure = reason
            self._tell_all(_engine_state(name, supervisor))

        plan = plan_of(self._config.experiment) if self._config.experiment is not None else None
        starts = ArmStarts(
            self._config.arms, plan, self._builds, start=self._start_engine, failed=failed, say=self._say
        )
        served = await starts.run()
        if plan is not None and plan.retire and plan.candidate in served and plan.baseline not in served:
            self._say(f"Arm {plan.candidate} has nothing to be compared with and stops; the control serves on")
            self._conclude(False)

    async def _start_engine(self, name: str, config: EngineConfig) -> EngineInfo:
        supervisor = self._supervisors[name]
        supervisor.config = config
        self._metrics.own.watch_engine(name, supervisor)
        await supervisor.start()
        try:
            return await supervisor.wait_ready()
        except EngineUnavailable as error:
            raise StartError(str(error)) from error

    # -- end ---------------------------------------------------------------------------------------------------

    async def _drain(self) -> None:
        timeout_s = self._config.drain_timeout_s
        num_in_flight = sum(counts.total()[0] for counts in self._counts)
        if num_in_flight:
            self._say(farewell(num_in_flight, timeout_s))
        for member in self._members:
            member.stopping = True  # whoever dies from now on is not replaced
        self._draining = True
        for member in self._by_identity.values():
            member.idle = False
        self._tell_all(m.Drain())
        self._check_idle()
        await first_of(self._idle.wait(), self._signals.quit.wait(), timeout_s=timeout_s)

    async def _close(self) -> None:
        """The engine goes first: handlers still at work learn it and can tell their clients."""
        self._closing = True
        for member in self._members:
            member.stopping = True
        if self._leaving:
            self._stopping.cancel()
        await asyncio.gather(*(engine.close() for engine in [*self._supervisors.values(), *self._leaving]))
        self._tell_all(m.Quit())
        await asyncio.gather(*(member.close(_WORKERS_CLOSE_S) for member in self._members))

    # -- the engine --------------------------------------------------------------------------------------------

    def _follow(self, name: str, supervisor: Supervisor) -> None:
        """Workers hear how this arm's engine is."""

        def on_down(reason: str, keep_waiting: bool) -> None:
            self._tell_all(_engine_state(name, supervisor, reason, keep_waiting=keep_waiting))

        def on_stats(stats: EngineStats) -> None:
            self._metrics.own.on_stats(name, stats)
            self._tell_all(m.Stats(name, stats))

        supervisor.on_up = lambda endpoint: self._tell_all(_engine_state(name, supervisor))
        supervisor.on_down = on_down
        supervisor.on_stats = on_stats

    def _conclude(self, promoted: bool) -> None:
        """The experiment is over, and what nobody needs any more stops."""
        config = self._config
        assert config.experiment is not None
        plan = plan_of(config.experiment)
        self._conclusion = m.Concluded(promoted)
        self._leaving = conclude_engines(self._supervisors, self._metrics.own, plan, promoted=promoted)
        control = self._supervisors[CONTROL]
        self._follow(CONTROL, control)
        self._tell_all(self._conclusion)
        self._tell_all(_engine_state(CONTROL, control))
        left = concluded(config, plan, control)
        counts = {arm.name: path for arm, path in zip(config.all_arms, self._count_files, strict=True)}
        for member in self._members:
            member.assign(left, [counts[arm.name] for arm in left.all_arms])
        self._say(told(plan, promoted=promoted, control=CONTROL))
        self._stopping = asyncio.create_task(stop(self._leaving), name="stop-engines")

    # -- the workers -------------------------------------------------------------------------------------------

    def _tell(self, message: m.ToWorker, identity: bytes | None) -> None:
        if identity is None:
            self._tell_all(message)
        else:
            self._channel.send(message, identity)

    def _tell_all(self, message: m.ToWorker) -> None:
        for identity in self._by_identity:
            self._channel.send(message, identity)

    def _on_spawn(self, member: Member) -> None:
        self._by_identity[member.identity] = member

    def _on_death(self, member: Member) -> None:
        """What it held is free, what it counted stays counted."""
        del self._by_identity[member.identity]
        for counts in self._counts:
            counts.clear(member.index)
        self._metrics.retire(member.identity)
        member.idle = True
        self._check_idle()

    def _handle(self, identity: bytes, message: m.ToOwner) -> None:
        member = self._by_identity.get(identity)
        if member is None:  # its last words came after its end
            return
        match message:
            case m.Hello():
                self._greet(member, message)
            case m.Failed():
                member.on_failed(message.reason)
            case m.Snapshot():
                self._metrics.take(identity, message)
            case m.Observed() | m.Act() | m.Scrape(what="experiments" | "experiment_events"):
                self._experiment.handle(identity, message)
            case m.Compared(found=found, dropped=dropped):
                outcome = found or dropped
                assert outcome is not None
                self._book.take(outcome)
            case m.Scrape(number=number, what="shadow"):
                self._channel.send(m.Scraped(number, orjson.dumps(self._book.report())), identity)
            case m.Scrape():
                self._metrics.report_soon(
                    set(self._by_identity), lambda report: self._answer(identity, message, report)
                )
            case m.Share(number=number, weights=weights):
                self._weights = m.Weights(weights, self._config.routing.salt)
                self._tell_all(self._weights)
                self._channel.send(m.Acted(number, None), identity)
            case m.ReloadKeys():
                self._channel.send(m.Reloaded(message.number, self.reload()), identity)
            case m.Idle():
                member.idle = True
                self._check_idle()

    def _answer(self, identity: bytes, asked: m.Scrape, report: Report) -> None:
        body = report.metrics() if asked.what == "metrics" else report.stats()
        self._channel.send(m.Scraped(asked.number, body), identity)

    def _greet(self, member: Member, hello: m.Hello) -> None:
        """The worker listens: it learns how everything is."""
        identity = member.identity
        self._channel.send(m.Keys(self._access.table), identity)
        if self._conclusion is not None and len(member.assigned.counts) > len(self._supervisors):
            self._channel.send(self._conclusion, identity)  # it was started before, and hears it once
        for name, supervisor in self._supervisors.items():
            self._channel.send(_engine_state(name, supervisor), identity)
        self._experiment.greet(identity)
        if self._weights is not None:
            self._channel.send(self._weights, identity)
        member.on_hello(hello.model_name)
        if self._draining:  # it was not there when the others were told
            self._channel.send(m.Drain(), identity)
        if self._closing:
            self._channel.send(m.Quit(), identity)

    def _ask_for_snapshots(self, number: int) -> None:
        self._tell_all(m.Collect(number))

    def _check_idle(self) -> None:
        if self._draining and all(member.idle for member in self._members):
            self._idle.set()


def _engine_state(
    arm: str, engine: Supervisor, reason: str | None = None, *, keep_waiting: bool = True
) -> m.EngineState:
    failure = reason or engine.failure
    return m.EngineState(arm, engine.ready, engine.endpoint, engine.info, failure, engine.num_restarts, keep_waiting)


def _on_port(config: ServerConfig, port: int) -> ServerConfig:
    """Port 0 was any free one: all workers take the one that was found."""
    return replace(config, port=port)
