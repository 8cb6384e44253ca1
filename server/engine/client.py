"""The engine as a single process sees it that both supervises it and sends it requests. No torch."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncGenerator, Callable, Sequence

from server.config import EngineConfig
from server.core import Request, StepOutput
from server.engine.connection import Sink
from server.engine.errors import EngineUnavailable
from server.engine.messages import EngineInfo, EngineStats
from server.engine.supervisor import ENGINE_PROGRAM, Supervisor


class EngineClient:
    """One engine, its supervisor and a line to it. `ready`, `info`, `stats` and `failure` say how it is."""

    def __init__(self, config: EngineConfig, program: Sequence[str] = ENGINE_PROGRAM) -> None:
        self.supervisor = Supervisor(config, b"client", program)
        self._line = self.supervisor.connection
        self.on_stats: Callable[[EngineStats], None] | None = None
        self._line.on_frame = lambda frame: self._on_stats(frame.stats)
        self.supervisor.on_stats = self._on_stats

    @property
    def ready(self) -> bool:
        return self.supervisor.ready

    @property
    def info(self) -> EngineInfo | None:
        return self.supervisor.info

    @property
    def stats(self) -> EngineStats:
        return self._line.stats

    @property
    def failure(self) -> str | None:
        return self.supervisor.failure

    @property
    def num_restarts(self) -> int:
        return self.supervisor.num_restarts

    @property
    def pid(self) -> int | None:
        """Process id of the running engine."""
        return self.supervisor.pid

    @property
    def num_in_flight(self) -> int:
        return self._line.num_in_flight

    def configure(self, config: EngineConfig) -> None:
        """Other settings, for an engine that has not been started yet."""
        self.supervisor.config = config

    async def start(self) -> None:
        """Starts the engine process and returns at once; see `wait_ready`."""
        await self.supervisor.start()

    async def wait_ready(self) -> EngineInfo:
        """Waits for the first readiness. Raises EngineUnavailable with the engine's reason if it can not start."""
        return await self.supervisor.wait_ready()

    def submit(self, request: Request, sink: Sink) -> None:
        """Sends a request; its outputs go to `sink`.

        Raises EngineUnavailable if the engine is not ready, ValueError if the request's id is in flight.
        """
        self._require_ready()
        self._line.submit(request, sink)

    def stream(self, request: Request) -> AsyncGenerator[StepOutput, None]:
        """`submit` as a generator; closing it aborts the request."""
        self._require_ready()
        return self._line.stream(request)

    def abort(self, request_id: str) -> None:
        """Ends a request within the current step; its sink hears no more."""
        self._line.abort(request_id)

    def hold(self, request_id: str) -> None:
        """Suspends a request whose reader is slow."""
        self._line.hold(request_id)

    def resume(self, request_id: str) -> None:
        """Its reader has caught up."""
        self._line.resume(request_id)

    async def drain(self, timeout_s: float) -> None:
        """Waits until nothing is in flight, at most `timeout_s` seconds."""
        with contextlib.suppress(TimeoutError):
            await asyncio.wait_for(self._line.wait_idle(), timeout_s)

    async def close(self) -> None:
        """Stops the engine: asked first, killed after a few seconds. Requests in flight fail."""
        await self.supervisor.close()

    def _require_ready(self) -> None:
        if not self.ready:
            raise EngineUnavailable(self.failure or "the engine is not ready")

    def _on_stats(self, stats: EngineStats) -> None:
        if self.on_stats is not None:
            self.on_stats(stats)
