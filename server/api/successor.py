"""A better engine takes over while the server serves: what is running ends on the old one, what comes goes to the new.

old ── serves ──────────────── drains ── closed
command builds … ► new engine starts … ready ── serves ►
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass

from server.api.builds import BuildError, output_of
from server.api.interfaces import EngineClientLike
from server.config import EngineConfig
from server.core import Request, StepOutput
from server.engine.connection import Sink
from server.engine.errors import EngineUnavailable
from server.engine.messages import EngineInfo, EngineStats

log = logging.getLogger("outpace.successor")

MAX_DRAIN_S = 3600.0


@dataclass(frozen=True, slots=True)
class Successor:
    """`command` prints on the last line of its standard output what `engine` makes the new engine's settings of."""

    command: Sequence[str]
    engine: Callable[[str], EngineConfig]


class EngineRelay:
    """An engine's client that another one can take the place of. Requests stay with the engine that got them."""

    def __init__(self, first: EngineClientLike) -> None:
        self._current = first
        self._leaving: EngineClientLike | None = None
        self._owners: dict[str, EngineClientLike] = {}
        self._on_stats: Callable[[EngineStats], None] | None = None
        self._restarts = 0

    @property
    def on_stats(self) -> Callable[[EngineStats], None] | None:
        return self._on_stats

    @on_stats.setter
    def on_stats(self, listener: Callable[[EngineStats], None] | None) -> None:
        self._on_stats = self._current.on_stats = listener

    @property
    def ready(self) -> bool:
        return self._current.ready

    @property
    def info(self) -> EngineInfo | None:
        return self._current.info

    @property
    def stats(self) -> EngineStats:
        return self._current.stats

    @property
    def failure(self) -> str | None:
        return self._current.failure

    @property
    def pid(self) -> int | None:
        return self._current.pid

    @property
    def num_restarts(self) -> int:
        return self._restarts + self._current.num_restarts

    async def start(self) -> None:
        await self._current.start()

    async def wait_ready(self) -> EngineInfo:
        return await self._current.wait_ready()

    def submit(self, request: Request, sink: Sink) -> None:
        """To the engine that serves now. Raises what its `submit` raises."""
        if self._leaving is not None and request.request_id in self._owners:
            raise ValueError(f"request id {request.request_id!r} is in flight")
        owner = self._current
        owner.submit(request, _Owned(self._owners, request.request_id, sink))
        self._owners[request.request_id] = owner

    def abort(self, request_id: str) -> None:
        self._owners.pop(request_id, self._current).abort(request_id)

    def hold(self, request_id: str) -> None:
        self._owners.get(request_id, self._current).hold(request_id)

    def resume(self, request_id: str) -> None:
        self._owners.get(request_id, self._current).resume(request_id)

    async def drain(self, timeout_s: float) -> None:
        engines = [engine for engine in (self._leaving, self._current) if engine is not None]
        await asyncio.gather(*(engine.drain(timeout_s) for engine in engines))

    async def close(self) -> None:
        engines = [engine for engine in (self._leaving, self._current) if engine is not None]
        await asyncio.gather(*(engine.close() for engine in engines))

    async def replace(self, new: EngineClientLike) -> None:
        """Starts `new`, moves over when it is ready, and closes the old engine when its last request has ended.

        Raises EngineUnavailable, with everything as it was, where `new` does not start.
        """
        await new.start()
        try:
            await new.wait_ready()
        except BaseException:
            await new.close()
            raise
        old, self._current = self._current, new
        self._restarts += old.num_restarts
        self._leaving = old
        old.on_stats, new.on_stats = None, self._on_stats
        await old.drain(MAX_DRAIN_S)
        await old.close()
        self._leaving = None


class _Owned:
    """Passes on, and forgets a request with its last output."""

    def __init__(self, owners: dict[str, EngineClientLike], request_id: str, sink: Sink) -> None:
        self._owners, self._request_id, self._sink = owners, request_id, sink

    def started(self) -> None:
        self._sink.started()

    def put(self, output: StepOutput) -> None:
        if output.finish_reason is not None:
            self._owners.pop(self._request_id, None)
        self._sink.put(output)

    def fail(self, error: EngineUnavailable) -> None:
        self._owners.pop(self._request_id, None)
        self._sink.fail(error)


@asynccontextmanager
async def succeeding(
    relay: EngineRelay,
    successor: Successor,
    client: Callable[[EngineConfig], EngineClientLike],
    say: Callable[[str], None],
) -> AsyncIterator[None]:
    """While the block runs, the successor is made and takes over; leaving the block ends what is under way."""
    task = asyncio.create_task(_succeed(relay, successor, client, say), name="successor")
    try:
        yield
    finally:
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)


async def _succeed(
    relay: EngineRelay,
    successor: Successor,
    client: Callable[[EngineConfig], EngineClientLike],
    say: Callable[[str], None],
) -> None:
    try:
        await relay.wait_ready()  # the original goes first: it is what answers meanwhile
        directory = await output_of(successor.command)
        config = successor.engine(directory)
        say(f"The optimised model is made; starting it: {directory}")
        await relay.replace(client(config))
        say("The optimised model serves; the original's engine is closed")
    except BuildError as error:
        say(f"The optimised model could not be made: {error}; the original goes on serving")
    except EngineUnavailable as error:
        say(f"The optimised model does not start: {error}; the original goes on serving")
    except Exception:
        log.exception("the optimised model could not take over; the original goes on serving")
