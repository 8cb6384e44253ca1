"""What the handlers share: settings, the engine's client, the text layer, and who may come in."""

from __future__ import annotations

import asyncio
import hashlib
import math
import time
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass, field
from functools import lru_cache

from aiohttp import web

from server.api.access.control import AccessControl
from server.api.access.counters import SharedCounts
from server.api.errors import engine_unavailable, model_not_found, queue_full, queue_full_of_tokens
from server.api.interfaces import EngineClientLike, TextLayerLike
from server.api.params import Limits
from server.config import ServerConfig
from server.core import Request
from server.engine.messages import EngineInfo
from server.telemetry.metrics import Metrics

MAX_RETRY_AFTER_S = 30


@dataclass(slots=True)
class ServerState:
    """`text` is None until it is loaded, `progress` says what start-up is doing, `draining` refuses new work.

    `num_in_flight` counts this process's requests from their arrival until their answer has left; `idle` is set while
    there are none. `counts` has the engine's requests of all API processes. `scrape` renders the whole server's
    metrics, `reload` does what SIGHUP does and gives one line for each thing that stayed as it was because it is wrong;
    where this process is not the only one both ask the owner.
    """

    config: ServerConfig
    engine: EngineClientLike
    metrics: Metrics
    version: str
    model_name: str
    access: AccessControl = field(default_factory=AccessControl)
    counts: SharedCounts = field(default_factory=SharedCounts)
    scrape: Callable[[], Awaitable[bytes]] | None = None
    reload: Callable[[], Awaitable[Sequence[str]]] | None = None
    text: TextLayerLike | None = None
    limits: Limits = field(default_factory=Limits)
    progress: str = "starting"
    draining: bool = False
    num_in_flight: int = 0
    created: int = field(default_factory=lambda: int(time.time()))
    idle: asyncio.Event = field(default_factory=asyncio.Event)

    _last_leave: float = 0.0
    _pace_s: float = 0.0

    def __post_init__(self) -> None:
        self.idle.set()

    @property
    def fingerprint(self) -> str:
        """Changes with the model and the version: what else decides the answer is in the request."""
        return _fingerprint(self.config.engine.model, self.model_name, self.version)

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

    def require_room(self, num_choices: int = 1) -> None:
        """Raises ApiError 429 where the queue is full; cheap enough to be asked before a body is read."""
        config = self.config.engine
        num_in_flight = self.counts.total()[0]
        info = self.engine.info
        num_slots = config.max_num_seqs or (1 if info is None else info.max_num_seqs)
        if num_in_flight + num_choices > num_slots + config.max_waiting:
            num_waiting = max(0, num_in_flight - num_slots)
            raise queue_full(num_waiting, config.max_waiting, self.retry_after_s(num_waiting))

    def admit(self, requests: Sequence[Request]) -> None:
        """Holds places for these engine requests until `leave`. Raises ApiError 429 where the queue would overflow.

        The bounds are those of the engine's queue, counted here: its own answer would have to wait for a step. What
        runs fits the KV cache, so prompts beyond that many tokens wait.
        """
        self.require_room(len(requests))
        num_tokens = sum(len(request.prompt_ids) for request in requests)
        limit = self._max_prompt_tokens
        in_flight_tokens = self.counts.total()[1]
        if limit is not None and in_flight_tokens and in_flight_tokens + num_tokens > limit:
            raise queue_full_of_tokens(in_flight_tokens, num_tokens, limit)
        self.counts.add(len(requests), num_tokens)

    def leave(self, requests: Sequence[Request]) -> None:
        """Gives back what `admit` held: the engine has done with them."""
        self.counts.add(-len(requests), -sum(len(request.prompt_ids) for request in requests))
        now = self.metrics.clock()
        took_s = min((now - self._last_leave) / len(requests), 60.0)
        self._last_leave = now
        self._pace_s += 0.1 * (took_s - self._pace_s)

    def retry_after_s(self, num_waiting: int) -> int:
        """When somebody who is refused now will find room: what waits has begun by then, at the present pace."""
        return max(1, min(math.ceil(num_waiting * self._pace_s), MAX_RETRY_AFTER_S))

    def begin(self) -> None:
        """A request that is to be answered has arrived."""
        self.num_in_flight += 1
        self.idle.clear()

    def end(self) -> None:
        """Its answer is complete, or its client is gone."""
        self.num_in_flight -= 1
        if self.num_in_flight == 0:
            self.idle.set()

    @property
    def _max_prompt_tokens(self) -> int | None:
        info = self.engine.info
        if info is None:
            return None
        waiting = self.config.engine.max_waiting_tokens
        return info.kv_cache_tokens + (8 * info.kv_cache_tokens if waiting is None else waiting)


@lru_cache(maxsize=8)
def _fingerprint(*names: str) -> str:
    return f"fp_{hashlib.sha256(chr(0).join(names).encode()).hexdigest()[:10]}"


STATE: web.AppKey[ServerState] = web.AppKey("state", ServerState)
