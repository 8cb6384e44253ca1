"""Starts the engine process, watches it, and starts another one when it dies or hangs. No torch."""

from __future__ import annotations

import asyncio
import contextlib
import json
import logging
import os
import shutil
import signal
import sys
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path

import msgspec

from server.config import EngineConfig
from server.engine.connection import EngineConnection
from server.engine.environment import engine_environment
from server.engine.errors import EngineUnavailable
from server.engine.kinds import PING, STOP
from server.engine.messages import EngineInfo, EngineStats

log = logging.getLogger("outpace.engine.supervisor")

ENGINE_PROGRAM = ("-m", "server.engine.process")
FIRST_BACKOFF_S, MAX_BACKOFF_S = 0.5, 30.0
STOP_TIMEOUT_S = 5.0
PING_INTERVAL_S = 1.0
LAST_WORDS_S = 0.5
"""How long a hung engine has to write where it hangs before it is killed."""


class Supervisor:
    """Runs one engine process at a time. `ready`, `info`, `failure` and `num_restarts` say how it is.

    A death before the first readiness is final: `wait_ready` raises with the engine's own reason. After a later one, or
    after a step that hung, a new process is started, after a pause that doubles from 0.5 s.
    `program` is what Python runs, with the endpoint as its last argument (another one: tests and benchmarks of the HTTP
    side). `connection` is this process's own line. `on_up(endpoint)` and `on_down(reason, keep_waiting)` tell others
    when an engine came and went.
    """

    def __init__(
        self, config: EngineConfig, identity: bytes = b"supervisor", program: Sequence[str] = ENGINE_PROGRAM
    ) -> None:
        self.config = config
        self._program = program
        self.connection = EngineConnection(identity)
        self.connection.on_info = self._on_info
        self.connection.on_error = self._on_error
        self.connection.on_pong = self._on_pong
        self.on_up: Callable[[str], None] | None = None
        self.on_down: Callable[[str, bool], None] | None = None
        self.on_stats: Callable[[EngineStats], None] | None = None
        self.ready = False
        self.info: EngineInfo | None = None
        self.failure: str | None = None
        self.endpoint = ""
        self.num_restarts = 0
        self.num_hangs = 0
        self.directory: Path | None = None
        self.process: asyncio.subprocess.Process | None = None
        self._task: asyncio.Task[None] | None = None
        self._settled = asyncio.Event()
        self._broken = asyncio.Event()
        self._closing = False
        self._last_pong = 0.0

    # -- life ------------------------------------------------------------------------------------------------

    @property
    def pid(self) -> int | None:
        """Process id of the running engine."""
        return None if self.process is None or self.process.returncode is not None else self.process.pid

    async def start(self) -> None:
        """Starts the engine process and returns at once; see `wait_ready`."""
        self.directory = Path(tempfile.mkdtemp(prefix="outpace-"))
        self._task = asyncio.create_task(self._supervise(), name="engine-supervisor")

    async def wait_ready(self) -> EngineInfo:
        """Waits for the first readiness. Raises EngineUnavailable with the engine's reason if it can not start."""
        await self._settled.wait()
        if self.info is None:
            raise EngineUnavailable(self.failure or "the engine was stopped before it was ready")
        return self.info

    async def close(self) -> None:
        """Stops the engine: asked first, killed after STOP_TIMEOUT_S. Requests in flight fail."""
        self._closing = True
        process = self.process
        if process is not None and process.returncode is None:
            if self.ready and self.connection.connected:
                self.connection.send(STOP)
            else:  # it is still loading: it reads no messages, and signals are the server's to handle
                process.kill()
            try:
                await asyncio.wait_for(process.wait(), STOP_TIMEOUT_S)
            except TimeoutError:
                process.kill()
        if self._task is not None:
            self._task.cancel()
            await asyncio.gather(self._task, return_exceptions=True)
        self._settled.set()
        self._down("the server is shutting down", keep_waiting=False)
        self.connection.close()
        if self.directory is not None:
            shutil.rmtree(self.directory, ignore_errors=True)

    # -- supervision -----------------------------------------------------------------------------------------

    async def _supervise(self) -> None:
        try:
            await self._keep_alive()
        except Exception as error:
            log.exception("the supervisor of the engine failed")
            self.failure = f"the server lost its engine: {error}"
            self._down(self.failure, keep_waiting=False)
            self._settled.set()

    async def _keep_alive(self) -> None:
        backoff = FIRST_BACKOFF_S
        while not self._closing:
            started = asyncio.get_running_loop().time()
            try:
                reason, was_ready = await self._run_once()
            except Exception as error:
                log.exception("the supervisor of the engine failed")
                reason, was_ready = f"the server lost its engine: {error}", False
            if self._closing:
                return
            if self.info is None:
                self.failure = reason
                self._settled.set()
                return
            self.failure = f"{reason}; restarting"
            log.error("%s", self.failure)
            # What waits is worth keeping for one start; an engine that does not come back must not make it hang.
            self._down("the engine process died; the request was lost, send it again", keep_waiting=was_ready)
            if asyncio.get_running_loop().time() - started > 60:
                backoff = FIRST_BACKOFF_S
            await asyncio.sleep(backoff)
            backoff = min(backoff * 2, MAX_BACKOFF_S)
            self.num_restarts += 1

    async def _run_once(self) -> tuple[str, bool]:
        """One life of the process: start, readiness, work, death. Returns why it ended and whether it was ready."""
        assert self.directory is not None
        endpoint = str(self.directory / f"engine-{self.num_restarts}.sock")
        try:
            process = self.process = await asyncio.create_subprocess_exec(
                sys.executable,
                "-P",  # never import from the directory the user happens to stand in
                *self._program,
                endpoint,
                stdin=asyncio.subprocess.PIPE,
                stdout=asyncio.subprocess.PIPE,
                env=engine_environment(),
            )
        except OSError as error:
            return f"the engine process could not be started ({error})", False
        reason: str | None = None
        was_ready = False
        try:
            assert process.stdin is not None and process.stdout is not None
            process.stdin.write(msgspec.json.encode(self.config))
            process.stdin.close()
            reason = await self._read_verdict(process.stdout)
            if reason is None:
                was_ready = True
                reason = await self._watch(process, endpoint)
        finally:
            if process.returncode is None:
                process.kill()
            await process.wait()
        return reason or f"the engine process ended unexpectedly (exit code {process.returncode})", was_ready

    async def _read_verdict(self, stdout: asyncio.StreamReader) -> str | None:
        """None once the engine is ready, else why it will not be."""
        try:
            verdict = json.loads(await stdout.readline())
        except ValueError:  # nothing, or no line of ours
            return "the engine process died while loading (see the log above)"
        return None if verdict.get("ready") else str(verdict["failure"])

    async def _watch(self, process: asyncio.subprocess.Process, endpoint: str) -> str | None:
        """Until the process ends, hangs, or says what can not be handled. Returns why, None for an end of its own."""
        self._broken.clear()
        self.endpoint = endpoint
        try:
            self.connection.connect(endpoint)
        except OSError:  # it has died since
            await process.wait()
            return None
        watchers = [
            asyncio.create_task(process.wait()),
            asyncio.create_task(self._broken.wait()),
            asyncio.create_task(self._wait_until_hung(process)),
        ]
        try:
            await asyncio.wait(watchers, return_when=asyncio.FIRST_COMPLETED)
        finally:
            hung = watchers[2].done() and not watchers[2].cancelled()
            for watcher in watchers:
                watcher.cancel()
            await asyncio.gather(*watchers, return_exceptions=True)
            self.ready = False
        if hung:
            self.num_hangs += 1
            return f"the engine hung: no step ended for {self.config.step_timeout_s:g} s"
        return "a message from the engine could not be handled" if self._broken.is_set() else None

    async def _wait_until_hung(self, process: asyncio.subprocess.Process) -> None:
        """Pings the loop, which answers between steps; returns when it did not for `step_timeout_s`."""
        loop = asyncio.get_running_loop()
        self._last_pong = loop.time()
        interval = min(PING_INTERVAL_S, self.config.step_timeout_s / 4)
        while loop.time() - self._last_pong < self.config.step_timeout_s:
            self.connection.send(PING)
            asked = loop.time()
            await asyncio.sleep(interval)
            overslept = loop.time() - asked - interval
            if overslept > interval:  # it was this process that stood still: the engine may have answered long since
                self._last_pong += overslept
        with contextlib.suppress(ProcessLookupError, OSError):
            os.kill(process.pid, signal.SIGUSR1)  # it writes where its threads are
            await asyncio.sleep(LAST_WORDS_S)

    def _on_pong(self, stats: EngineStats) -> None:
        self._last_pong = asyncio.get_running_loop().time()
        self.connection.stats = stats
        self._tell_stats(stats)

    def _tell_stats(self, stats: EngineStats) -> None:
        if self.on_stats is not None:
            try:
                self.on_stats(stats)
            except Exception:
                log.exception("the engine's counters could not be told")

    def _on_info(self, info: EngineInfo) -> None:
        self.info = info
        self.failure = None
        self.ready = True
        self._settled.set()
        if self.on_up is not None:
            self.on_up(self.endpoint)

    def _on_error(self, error: Exception) -> None:
        log.error("a message from the engine could not be handled", exc_info=error)
        self._broken.set()

    def _down(self, reason: str, *, keep_waiting: bool) -> None:
        self.ready = False
        self.connection.disconnect(reason, keep_waiting=keep_waiting)
        self._tell_stats(EngineStats())
        if self.on_down is not None:
            self.on_down(reason, keep_waiting)
