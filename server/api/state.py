"""What the handlers share: settings, the engine's client, the text layer, and who may come in."""

from __future__ import annotations

import asyncio
import hashlib
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field

from aiohttp import web

from server.api.errors import engine_unavailable, model_not_found, queue_full
from server.api.interfaces import EngineClientLike, TextLayerLike
from server.api.params import Limits
from server.config import ServerConfig
from server.engine.messages import EngineInfo
from server.telemetry.metrics import Metrics


@dataclass(slots=True)
class ServerState:
    """`text` is None until it is loaded, `progress` says what start-up is doing, `draining` refuses new work.

    `num_in_flight` counts engine requests; `idle` is set while there are none.
    """

    config: ServerConfig
    engine: EngineClientLike
    metrics: Metrics
    version: str
    model_name: str
    text: TextLayerLike | None = None
    limits: Limits = field(default_factory=Limits)
    progress: str = "starting"
    draining: bool = False
    num_in_flight: int = 0
    created: int = field(default_factory=lambda: int(time.time()))
    idle: asyncio.Event = field(default_factory=asyncio.Event)

    def __post_init__(self) -> None:
        self.idle.set()

    @property
    def fingerprint(self) -> str:
        """Changes with the model and the version: what else decides the answer is in the request."""
        digest = hashlib.sha256(f"{self.config.engine.model}\0{self.model_name}\0{self.version}".encode())
        return f"fp_{digest.hexdigest()[:10]}"

    @property
    def not_ready(self) -> tuple[str, str] | None:
        """Why the server does not serve, as (status, reason); None while it does."""
        if self.draining:
            return "draining", "The server is shutting down."
        engine = self.engine
        if engine.ready and engine.info is not None and self.text is not None:
            return None
        if engine.ready or engine.failure is None:
            return "starting", self.progress
        return "failed" if engine.info is None else "restarting", engine.failure

    def require_ready(self) -> tuple[EngineInfo, TextLayerLike]:
        """Raises ApiError 503 with the reason where the server does not serve now."""
        reason = self.not_ready
        info, text = self.engine.info, self.text
        if reason is not None:
            code = "shutting_down" if self.draining else "engine_unavailable"
            raise engine_unavailable(f"The server is not ready ({reason[0]}): {reason[1]}", code)
        assert info is not None and text is not None
        return info, text

    def require_model(self, model: str | None) -> None:
        if model is not None and model not in (self.model_name, self.config.engine.model):
            raise model_not_found(model)

    @contextmanager
    def admit(self, num_choices: int) -> Iterator[None]:
        """Holds places for this many engine requests. Raises ApiError 429 where the queue would overflow.

        The engine's own count is one step old, so what was handed to it since is counted here as well.
        """
        config = self.config.engine
        num_waiting = max(self.engine.stats.num_waiting, self.num_in_flight - config.max_num_seqs)
        room = config.max_num_seqs + config.max_waiting - self.num_in_flight
        if num_waiting >= config.max_waiting or num_choices > room:
            raise queue_full(num_waiting, config.max_waiting)
        self.num_in_flight += num_choices
        self.idle.clear()
        try:
            yield
        finally:
            self.num_in_flight -= num_choices
            if self.num_in_flight == 0:
                self.idle.set()


STATE: web.AppKey[ServerState] = web.AppKey("state", ServerState)
