"""One server process from bind to exit: socket first, then the model, then the engine; drain on a signal.

bind ── /health 200, /ready 503 ──► text layer ∥ engine ──► /ready 200 ── SIGTERM ──► /ready 503,
new work 503 ── in-flight done or drain_timeout_s over ──► engine closed (what is left fails with 503) ──► exit
"""

from __future__ import annotations

import asyncio
import errno
import logging
import signal
import threading
from collections.abc import Callable
from typing import TypeVar

from aiohttp import web

from server.api.app import create_app, create_runner
from server.api.banner import banner
from server.api.interfaces import EngineClientLike, TextLayerLike
from server.api.state import ServerState
from server.config import ServerConfig
from server.engine.errors import EngineUnavailable
from server.telemetry.metrics import Metrics

logger = logging.getLogger(__name__)

# How long handlers get to tell their clients that the engine is gone.
_FAREWELL_S = 1.0
_ENGINE_CLOSE_S = 10.0

LoadText = Callable[[], tuple[TextLayerLike, str]]
Say = Callable[[str], None]
T = TypeVar("T")


class StartError(RuntimeError):
    """The server could not start; the message is one line for the person who typed the command."""


class Server:
    """Runs until a signal. `load_text` (called on a thread) gives the text layer and the model's short name.

    `load_text` raises ValueError with what is wrong with the model. `url` is empty until the socket is bound.
    """

    def __init__(
        self, config: ServerConfig, engine: EngineClientLike, load_text: LoadText, version: str, say: Say
    ) -> None:
        self._config = config
        self._load_text = load_text
        self._say = say
        self._stop = asyncio.Event()
        self._quit = asyncio.Event()
        name = config.served_model_name or config.engine.model
        self.state = ServerState(config, engine, Metrics(version), version, name)
        self.url = ""

    async def run(self) -> None:
        """Serves until stopped. Raises StartError."""
        runner = create_runner(create_app(self.state))
        await runner.setup()
        loop = asyncio.get_running_loop()
        for number in (signal.SIGTERM, signal.SIGINT):
            loop.add_signal_handler(number, self.stop)
        try:
            self.url = await self._bind(runner)
            if await self._start_unless_stopped():
                await self._stop.wait()
                await self._drain()
        finally:
            await self._close(runner)

    def stop(self) -> None:
        """What a signal does: the first drains, the second quits at once."""
        if self._stop.is_set():
            self._quit.set()
        self._stop.set()
        self.state.draining = True

    async def _bind(self, runner: web.AppRunner) -> str:
        host, port = self._config.host, self._config.port
        try:
            await web.TCPSite(runner, host, port).start()
        except OSError as error:
            raise StartError(bind_failure(host, port, error)) from error
        address = runner.addresses[0]
        shown = f"[{address[0]}]" if ":" in address[0] else address[0]
        return f"http://{shown}:{address[1]}"

    async def _start_unless_stopped(self) -> bool:
        start = asyncio.create_task(self._start())
        stop = asyncio.create_task(self._stop.wait())
        try:
            await asyncio.wait({start, stop}, return_when=asyncio.FIRST_COMPLETED)
            if start.done():
                start.result()
                return True
            return False
        finally:
            start.cancel()
            stop.cancel()
            await asyncio.gather(start, stop, return_exceptions=True)

    async def _start(self) -> None:
        state = self.state
        self._say(f"Loading {self._config.engine.model}; {self.url}/ready says when it serves")
        state.progress = "The model is being loaded."
        # The engine's process imports its libraries while the model is looked up here.
        await state.engine.start()
        try:
            state.text, name = await _on_daemon_thread(self._load_text)
            state.model_name = self._config.served_model_name or name
            info = await state.engine.wait_ready()
        except ValueError as error:
            raise StartError(str(error)) from error
        except EngineUnavailable as error:
            raise StartError(f"the engine failed to start: {error}") from error
        state.metrics.on_ready(info)
        self._say(banner(self._config, info, state.model_name, self.url))

    async def _drain(self) -> None:
        state, timeout_s = self.state, self._config.drain_timeout_s
        if state.num_in_flight:
            self._say(
                f"Stopping: {state.num_in_flight} sequences get up to {timeout_s:g} s to finish; "
                "another signal quits at once"
            )
        done = asyncio.create_task(self._wait_until_idle())
        quit_now = asyncio.create_task(self._quit.wait())
        await asyncio.wait({done, quit_now}, timeout=timeout_s, return_when=asyncio.FIRST_COMPLETED)
        done.cancel()
        quit_now.cancel()
        await asyncio.gather(done, quit_now, return_exceptions=True)

    async def _wait_until_idle(self) -> None:
        await self.state.idle.wait()
        await self.state.engine.drain(self._config.drain_timeout_s)

    async def _close(self, runner: web.AppRunner) -> None:
        """The engine goes first: handlers still at work learn it and can tell their clients."""
        try:
            await asyncio.wait_for(self.state.engine.close(), _ENGINE_CLOSE_S)
        except TimeoutError:
            logger.warning("the engine did not close within %g s", _ENGINE_CLOSE_S)
        if not self._quit.is_set():
            await asyncio.wait({asyncio.create_task(self.state.idle.wait())}, timeout=_FAREWELL_S)
        await runner.cleanup()


async def _on_daemon_thread(function: Callable[[], T]) -> T:
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


def bind_failure(host: str, port: int, error: OSError) -> str:
    """One line on why the address cannot be had and what to do."""
    if error.errno == errno.EADDRINUSE:
        return f"port {port} on {host} is in use; choose another with --port (0: any free port)"
    if error.errno == errno.EACCES:
        return f"port {port} on {host} needs privileges that this process does not have; choose one above 1023"
    return f"cannot listen on {host}:{port}: {error.strerror or error}"
