"""What the handlers share: settings, the arms, and who may come in."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

from aiohttp import web

from server.api.access.auth import caller_of
from server.api.access.control import AccessControl
from server.api.arm import Arm
from server.api.arms import Arms
from server.api.errors import ApiError, engine_unavailable
from server.api.experiment import ExperimentLike, Watch
from server.api.params import Limits
from server.api.replays import Replays
from server.config import ServerConfig
from server.telemetry.metrics import Metrics
from server.telemetry.tracing import Tracing


@dataclass(slots=True)
class ServerState:
    """`draining` refuses new work. `tracing` makes a span of each request, where it is configured. `watch` sees what
    the requests of an experiment do, `experiment` is that experiment. `replays` runs copies of requests, `comparisons`
    tells what they showed, of the whole server. `share` makes everybody assign keys by other weights (percent by arm).

    `num_in_flight` counts this process's requests from their arrival until their answer has left; `idle` is set while
    there are none. `scrape` and `stats` render the whole server's metrics, `reload` does what SIGHUP does and gives one
    line for each thing that stayed as it was because it is wrong; where this process is not the only one all ask the
    owner.
    """

    config: ServerConfig
    arms: Arms
    metrics: Metrics
    version: str
    access: AccessControl = field(default_factory=AccessControl)
    scrape: Callable[[], Awaitable[bytes]] | None = None
    stats: Callable[[], Awaitable[bytes]] | None = None
    reload: Callable[[], Awaitable[Sequence[str]]] | None = None
    limits: Limits = field(default_factory=Limits)
    watch: Watch | None = None
    experiment: ExperimentLike | None = None
    replays: Replays | None = None
    comparisons: Callable[[], Awaitable[dict[str, Any]]] | None = None
    share: Callable[[dict[str, float]], Awaitable[None]] | None = None
    tracing: Tracing | None = None
    draining: bool = False
    num_in_flight: int = 0
    created: int = field(default_factory=lambda: int(time.time()))
    idle: asyncio.Event = field(default_factory=asyncio.Event)

    def __post_init__(self) -> None:
        self.idle.set()

    @property
    def control(self) -> Arm:
        """What answers where nothing else is said."""
        return self.arms.control

    @property
    def not_ready(self) -> tuple[str, str] | None:
        """Why the server does not serve, as (status, reason); None while it does."""
        if self.draining:
            return "draining", "The server is shutting down."
        return self.control.not_ready

    def route(self, request: web.Request, model: str | None, user: str | None = None) -> Arm:
        """What answers: see `Arms.of`. Raises ApiError as that does, and 503 where nothing serves."""
        arm = self.arms.of(request, model, user, caller_of(request).name)
        if self.draining:
            raise engine_unavailable(
                "The server is not ready (draining): The server is shutting down.", "shutting_down"
            )
        arm.require_ready()
        return arm

    def require_room(self) -> None:
        """Raises ApiError 429 where every queue is full; cheap enough to be asked before a body is read."""
        full: ApiError | None = None
        for arm in self.arms.every:
            try:
                return arm.require_room()
            except ApiError as error:
                full = full or error
        assert full is not None
        raise full

    def begin(self) -> None:
        """A request that is to be answered has arrived."""
        self.num_in_flight += 1
        self.idle.clear()

    def end(self) -> None:
        """Its answer is complete, or its client is gone."""
        self.num_in_flight -= 1
        if self.num_in_flight == 0:
            self.idle.set()


STATE: web.AppKey[ServerState] = web.AppKey("state", ServerState)
