"""The engine as an API worker sees it: its own line to the engine's process, whose life is the owner's business."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Callable

from server.api.pool.messages import EngineState
from server.core import Request
from server.engine.connection import EngineConnection, Sink
from server.engine.errors import EngineUnavailable
from server.engine.messages import EngineInfo, EngineStats


class RemoteEngine:
    """Follows the owner's `EngineState` messages; see `EngineClientLike`."""

    def __init__(self, identity: bytes) -> None:
        self.line = EngineConnection(identity)
        self.line.on_error = self._on_error
        self.on_stats: Callable[[EngineStats], None] | None = None
        self.info: EngineInfo | None = None
        self.failure: str | None = None
        self.num_restarts = 0
        self.pid: int | None = None
        """The owner's business."""
        self.broken: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self._stats = EngineStats()
        self._ready = asyncio.Event()

    @property
    def ready(self) -> bool:
        return self.line.connected

    @property
    def stats(self) -> EngineStats:
        return self._stats

    def apply(self, state: EngineState) -> None:
        """The engine came or went."""
        self.info, self.failure, self.num_restarts = state.info, state.failure, state.num_restarts
        if state.ready and not self.line.connected:
            with contextlib.suppress(OSError):  # it has died since, and the owner will say so
                self.line.connect(state.endpoint)
                self._ready.set()
        elif not state.ready and self.line.connected:
            self._ready.clear()
            self.line.disconnect(state.failure or "the engine is gone", keep_waiting=state.keep_waiting)
        elif not state.ready and not state.keep_waiting:
            self.line.disconnect(state.failure or "the engine is gone", keep_waiting=False)

    def apply_stats(self, stats: EngineStats) -> None:
        """What the engine told the owner of itself."""
        self._stats = stats

    async def start(self) -> None:
        """Nothing: the owner starts it."""

    async def wait_ready(self) -> EngineInfo:
        await self._ready.wait()
        assert self.info is not None
        return self.info

    def submit(self, request: Request, sink: Sink) -> None:
        """Raises EngineUnavailable if the engine is not ready, ValueError if the request's id is in flight."""
        if not self.ready:
            raise EngineUnavailable(self.failure or "the engine is not ready")
        self.line.submit(request, sink)

    def abort(self, request_id: str) -> None:
        self.line.abort(request_id)

    def hold(self, request_id: str) -> None:
        self.line.hold(request_id)

    def resume(self, request_id: str) -> None:
        self.line.resume(request_id)

    async def drain(self, timeout_s: float) -> None:
        with contextlib.suppress(TimeoutError):
            await asyncio.wait_for(self.line.wait_idle(), timeout_s)

    async def close(self) -> None:
        self.line.close()

    def _on_error(self, error: Exception) -> None:
        """What this worker can not read leaves its requests hanging: it ends, and the owner starts another."""
        if not self.broken.done():
            self.broken.set_exception(error)
