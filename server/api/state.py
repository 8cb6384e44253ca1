"""What the handlers share: settings, the arms, and who may come in."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass, field

from aiohttp import web

from server.api.access.control import AccessControl
from server.api.arm import Arm
from server.api.errors import engine_unavailable, model_not_found
from server.api.params import Limits
from server.config import ServerConfig
from server.telemetry.metrics import Metrics


@dataclass(slots=True)
class ServerState:
    """`arms` are the models that are served, the control arm first; `draining` refuses new work.

    `num_in_flight` counts this process's requests from their arrival until their answer has left; `idle` is set while
    there are none. `scrape` renders the whole server's metrics, `reload` does what SIGHUP does and gives one line for
    each thing that stayed as it was because it is wrong; where this process is not the only one both ask the owner.
    """

    config: ServerConfig
    arms: Sequence[Arm]
    metrics: Metrics
    version: str
    access: AccessControl = field(default_factory=AccessControl)
    scrape: Callable[[], Awaitable[bytes]] | None = None
    reload: Callable[[], Awaitable[Sequence[str]]] | None = None
    limits: Limits = field(default_factory=Limits)
    draining: bool = False
    num_in_flight: int = 0
    created: int = field(default_factory=lambda: int(time.time()))
    idle: asyncio.Event = field(default_factory=asyncio.Event)

    def __post_init__(self) -> None:
        self.idle.set()

    @property
    def control(self) -> Arm:
        """What answers where nothing else is said."""
        return self.arms[0]

    @property
    def not_ready(self) -> tuple[str, str] | None:
        """Why the server does not serve, as (status, reason); None while it does."""
        if self.draining:
            return "draining", "The server is shutting down."
        return self.control.not_ready

    def route(self, model: str | None) -> Arm:
        """What answers a request for `model`. Raises ApiError: 404 for an unknown one, 503 where nothing serves."""
        arm = self.control
        if model is not None and model not in (arm.model_name, arm.config.model):
            raise model_not_found(model)
        if self.draining:
            raise engine_unavailable(
                "The server is not ready (draining): The server is shutting down.", "shutting_down"
            )
        arm.require_ready()
        return arm

    def require_room(self) -> None:
        """Raises ApiError 429 where the queue is full; cheap enough to be asked before a body is read."""
        self.control.require_room()

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
