"""One server process from bind to exit: socket first, then the model, then the engine; drain on a signal.

bind ── /health 200, /ready 503 ──► text layer ∥ engine ──► /ready 200 ── SIGTERM ──► /ready 503,
new work 503 ── in-flight done or drain_timeout_s over ──► engine closed (what is left fails with 503) ──► exit
"""

from __future__ import annotations

import asyncio
import logging
import signal
import socket
import threading
from collections.abc import Callable, Coroutine, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

from server.api import sockets
from server.api.access.control import AccessControl
from server.api.access.keys import KeyFileError
from server.api.arm import Arm
from server.api.arms import Arms
from server.api.banner import banner
from server.api.builds import Builds
from server.api.conclusion import conclude, stop, told
from server.api.experiment import conducted, experiment_of
from server.api.front import Front
from server.api.interfaces import EngineClientLike, TextLayerLike
from server.api.params import Limits
from server.api.replays import compare_here
from server.api.starting import ArmStarts, StartError, pending
from server.api.state import ServerState
from server.config import CONTROL, ConfigError, EngineConfig, ServerConfig
from server.engine.errors import EngineUnavailable
from server.engine.messages import EngineInfo
from server.routing.plan import plan_of
from server.telemetry.metrics import Metrics
from server.telemetry.tracing import Tracing

logger = logging.getLogger(__name__)

_ENGINE_CLOSE_S = 10.0

LoadText = Callable[[], tuple[TextLayerLike, str]]
Say = Callable[[str], None]
T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class Backend:
    """An arm to be served. `load_text` (called on a thread) gives the text layer and the model's short name; it raises
    ValueError with what is wrong with the model.

    `configure` gives the engine other settings before it starts: those of an optimised model.
    """

    config: EngineConfig
    engine: EngineClientLike
    load_text: LoadText
    name: str = CONTROL
    configure: Callable[[EngineConfig], None] | None = None


class Signals:
    """What signals mean to a server: the first SIGTERM or SIGINT drains, the second quits at once, SIGHUP reloads."""

    def __init__(self, on_stop: Callable[[], None], on_reload: Callable[[], None]) -> None:
        self.stop = asyncio.Event()
        self.quit = asyncio.Event()
        self._on_stop = on_stop
        loop = asyncio.get_running_loop()
        for number in (signal.SIGTERM, signal.SIGINT):
            loop.add_signal_handler(number, self.on_stop)
        loop.add_signal_handler(signal.SIGHUP, on_reload)

    def on_stop(self) -> None:
        if self.stop.is_set():
            self.quit.set()
        self.stop.set()
        self._on_stop()


class Server:
    """Runs until a signal. The first backend is the control: without it nothing is served, without another one less.

    `url` is empty until the socket is bound.
    """

    def __init__(
        self,
        config: ServerConfig,
        backends: Sequence[Backend],
        version: str,
        say: Say,
        builds: Builds | None = None,
    ) -> None:
        self._config = config
        self._builds = builds
        self._backends = backends
        self._say = say
        self._leaving: list[EngineClientLike] = []
        self._stopping: asyncio.Task[None] | None = None
        self.url = ""
        self.signals = Signals(self._on_stop, self._on_reload)
        try:
            access = AccessControl.from_file(config.api_keys)
            limits = Limits(max_body_bytes=config.max_body_bytes)
            metrics = Metrics(
                version,
                served_model_name=config.served_model_name,
                aliases=config.metric_aliases,
                price_per_hour=config.price_per_hour,
            )
            arms = [
                Arm(b.name, b.config, b.engine, config.served_model_name or b.config.model, metrics.clock)
                for b in backends
            ]
            self.state = ServerState(
                config,
                Arms.of_config(config, arms),
                metrics,
                version,
                limits=limits,
                access=access,
                tracing=Tracing.from_settings(config.otel_endpoint, version),
            )
            self.state.reload = self.reload
            self._front = Front(self.state)
            self._experiment = experiment_of(self.state, say, self._conclude)
            compare_here(self.state)
            for name in pending(config):  # an engine that nobody has started is nothing to be alarmed of
                metrics.forget_engine(name)
        except (KeyFileError, ConfigError) as error:
            raise StartError(str(error)) from error

    async def run(self) -> None:
        """Serves until stopped. Raises StartError."""
        try:
            self.url = await self._listen()
            if await until_stopped(self._start(), self.signals.stop):
                with conducted(self._experiment, self.state.watch):
                    await until_stopped(self._start_others(), self.signals.stop)
                    await self.signals.stop.wait()
                    await self._drain()
        finally:
            await self._close()

    async def reload(self) -> Sequence[str]:
        """What SIGHUP does. One line for each thing that stayed as it was because it is wrong."""
        problem = self.state.access.reload()
        return ([] if problem is None else [problem]) + self._front.reload()

    def stop(self) -> None:
        """What SIGTERM does: the first time drain, the second time quit at once."""
        self.signals.on_stop()

    def _on_stop(self) -> None:
        self.state.draining = True

    def _on_reload(self) -> None:
        task = asyncio.ensure_future(self.reload())
        task.add_done_callback(lambda done: done.result())

    async def _listen(self) -> str:
        bound = bound_or_start_error(lambda: sockets.bind(self._config.host, self._config.port))
        await self._front.listen(bound)
        return sockets.url_of(
            self._config.host, sockets.port_of(bound[0]), tls=self._config.tls_certificate is not None
        )

    async def _start(self) -> None:
        arm = self.state.control
        self._say(f"Loading {arm.config.model}; {self.url}/ready says when it serves")
        info = await self._start_arm(arm, self._backends[0])
        self._say(banner(self._config, info, arm.model_name, self.url))

    async def _start_others(self) -> None:
        """One that does not start leaves the others serving."""
        arms = {arm.name: arm for arm in self.state.arms.every}
        backends = {backend.name: backend for backend in self._backends}
        plan = plan_of(self._config.experiment) if self._config.experiment is not None else None

        def failed(name: str, reason: str) -> None:
            arms[name].failure = reason

        async def start(name: str, config: EngineConfig) -> EngineInfo:
            arm, backend = arms[name], backends[name]
            self.state.metrics.watch_engine(name, arm.engine)
            if config != arm.config and backend.configure is not None:
                arm.config = config
                backend.configure(config)
            return await self._start_arm(arm, backend)

        starts = ArmStarts(
            [arm for arm in self._config.arms if arm.name in backends],
            plan,
            self._builds,
            start=start,
            failed=failed,
            say=self._say,
        )
        served = await starts.run()
        if plan is not None and plan.retire and plan.candidate in served and plan.baseline not in served:
            self._say(f"Arm {plan.candidate} has nothing to be compared with and stops; the control serves on")
            self._leave(conclude(self.state, plan, promoted=False))

    def _conclude(self, promoted: bool) -> None:
        """The experiment is over, and what nobody needs any more stops."""
        assert self._config.experiment is not None
        plan = plan_of(self._config.experiment)
        self._say(told(plan, promoted=promoted, control=self.state.control.name))
        self._leave(conclude(self.state, plan, promoted=promoted))

    def _leave(self, engines: list[EngineClientLike]) -> None:
        self._leaving = engines
        self._stopping = asyncio.create_task(stop(engines), name="stop-engines")

    async def _start_arm(self, arm: Arm, backend: Backend) -> EngineInfo:
        arm.progress = "The model is being loaded."
        # The engine's process imports its libraries while the model is looked up here.
        await arm.engine.start()
        try:
            arm.text, name = await on_daemon_thread(backend.load_text)
            arm.model_name = self._config.served_model_name or name
            return await arm.engine.wait_ready()
        except ValueError as error:
            raise StartError(str(error)) from error
        except EngineUnavailable as error:
            raise StartError(f"the engine failed to start: {error}") from error

    async def _drain(self) -> None:
        state, timeout_s = self.state, self._config.drain_timeout_s
        if state.replays is not None:
            await state.replays.close()
        if state.num_in_flight:
            self._say(farewell(state.num_in_flight, timeout_s))
        await first_of(self._wait_until_idle(), self.signals.quit.wait(), timeout_s=timeout_s)

    async def _wait_until_idle(self) -> None:
        await self.state.idle.wait()
        timeout_s = self._config.drain_timeout_s
        await asyncio.gather(*(arm.engine.drain(timeout_s) for arm in self.state.arms.every))

    async def _close(self) -> None:
        """The engine goes first: handlers still at work learn it and can tell their clients."""
        try:
            if self._stopping is not None:
                self._stopping.cancel()
            engines = [*(arm.engine for arm in self.state.arms.every), *self._leaving]
            closing = asyncio.gather(*(engine.close() for engine in engines))
            await asyncio.wait_for(closing, _ENGINE_CLOSE_S)
        except TimeoutError:
            logger.warning("the engine did not close within %g s", _ENGINE_CLOSE_S)
        await self._front.close(at_once=self.signals.quit.is_set())


def farewell(num_in_flight: int, timeout_s: float) -> str:
    """What is said when a stop has to wait."""
    return f"Stopping: {num_in_flight} requests get up to {timeout_s:g} s to finish; another signal quits at once"


def bound_or_start_error(bind: Callable[[], list[socket.socket]]) -> list[socket.socket]:
    """Raises StartError where the address cannot be had."""
    try:
        return bind()
    except OSError as error:
        raise StartError(str(error)) from error


async def until_stopped(start: Coroutine[Any, Any, None], stop: asyncio.Event) -> bool:
    """Runs `start` to its end unless `stop` is set before; whether it ended. Raises what it raises."""
    starting = asyncio.ensure_future(start)
    stopping = asyncio.ensure_future(stop.wait())
    try:
        await asyncio.wait({starting, stopping}, return_when=asyncio.FIRST_COMPLETED)
        if starting.done():
            starting.result()
            return True
        return False
    finally:
        starting.cancel()
        stopping.cancel()
        await asyncio.gather(starting, stopping, return_exceptions=True)


async def first_of(*coroutines: Coroutine[Any, Any, Any], timeout_s: float) -> None:
    """Returns when one of them has ended or the time is over; the others are cancelled."""
    tasks = [asyncio.ensure_future(coroutine) for coroutine in coroutines]
    await asyncio.wait(tasks, timeout=timeout_s, return_when=asyncio.FIRST_COMPLETED)
    for task in tasks:
        task.cancel()
    await asyncio.gather(*tasks, return_exceptions=True)


async def on_daemon_thread(function: Callable[[], T]) -> T:
    """Like `asyncio.to_thread`, but a download that hangs keeps nobody from leaving."""
    loop = asyncio.get_running_loop()
    future: asyncio.Future[T] = loop.create_future()

    def settle(result: T | None, error: Exception | None) -> None:
        if future.cancelled():
            return
        if error is not None:
            future.set_exception(error)
        else:
            future.set_result(result)  # type: ignore[arg-type]

    def work() -> None:
        try:
            outcome: tuple[T | None, Exception | None] = (function(), None)
        except Exception as error:  # noqa: BLE001 - raised again where the result is awaited
            outcome = (None, error)
        if not loop.is_closed():
            loop.call_soon_threadsafe(settle, *outcome)

    threading.Thread(target=work, name="load-text", daemon=True).start()
    return await future
