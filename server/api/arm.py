"""A model that is served: its engine, its text layer, and how much it has to do."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import lru_cache

from server.api.access.counters import SharedCounts
from server.api.errors import engine_unavailable, queue_full, queue_full_of_tokens
from server.api.interfaces import EngineClientLike, TextLayerLike
from server.config import EngineConfig
from server.core import Request
from server.engine.messages import EngineInfo

MAX_RETRY_AFTER_S = 30


@dataclass(slots=True)
class Arm:
    """`text` is None until it is loaded, `progress` says what start-up is doing, `failure` why it never will serve,
    `counts` has the engine's requests of all API processes. `clock` is in seconds."""

    name: str
    config: EngineConfig
    engine: EngineClientLike
    model_name: str
    clock: Callable[[], float]
    counts: SharedCounts = field(default_factory=SharedCounts)
    text: TextLayerLike | None = None
    progress: str = "starting"
    failure: str | None = None

    _last_leave: float = 0.0
    _pace_s: float = 0.0

    def take_over(self, other: Arm) -> None:
        """`other`'s engine is this arm's from now on. What was admitted before leaves where it was admitted."""
        self.engine, self.config, self.failure = other.engine, other.config, None
        if other.text is not None:
            self.text = other.text

    @property
    def not_ready(self) -> tuple[str, str] | None:
        """Why it does not serve, as (status, reason); None while it does."""
        engine = self.engine
        if engine.ready and engine.info is not None and self.text is not None:
            return None
        if self.failure is not None:
            return "failed", self.failure
        if engine.ready or engine.failure is None:
            return "starting", self.progress
        return "failed" if engine.info is None else "restarting", engine.failure

    def require_ready(self) -> tuple[EngineInfo, TextLayerLike]:
        """Raises ApiError 503 with the reason where it does not serve now."""
        reason = self.not_ready
        if reason is not None:
            raise engine_unavailable(f"The server is not ready ({reason[0]}): {reason[1]}", "engine_unavailable")
        info, text = self.engine.info, self.text
        assert info is not None and text is not None
        return info, text

    def require_room(self, num_choices: int = 1) -> None:
        """Raises ApiError 429 where the queue is full; cheap enough to be asked before a body is read."""
        num_in_flight = self.counts.total()[0]
        info = self.engine.info
        num_slots = self.config.max_num_seqs or (1 if info is None else info.max_num_seqs)
        if num_in_flight + num_choices > num_slots + self.config.max_waiting:
            num_waiting = max(0, num_in_flight - num_slots)
            raise queue_full(num_waiting, self.config.max_waiting, self.retry_after_s(num_waiting))

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
        now = self.clock()
        took_s = min((now - self._last_leave) / len(requests), 60.0)
        self._last_leave = now
        self._pace_s += 0.1 * (took_s - self._pace_s)

    def retry_after_s(self, num_waiting: int) -> int:
        """When somebody who is refused now will find room: what waits has begun by then, at the present pace."""
        return max(1, min(math.ceil(num_waiting * self._pace_s), MAX_RETRY_AFTER_S))

    def fingerprint(self, version: str) -> str:
        """Changes with the model and the version: what else decides the answer is in the request."""
        return _fingerprint(self.config.model, self.model_name, version)

    @property
    def _max_prompt_tokens(self) -> int | None:
        info = self.engine.info
        if info is None:
            return None
        waiting = self.config.max_waiting_tokens
        return info.kv_cache_tokens + (8 * info.kv_cache_tokens if waiting is None else waiting)


@lru_cache(maxsize=64)
def _fingerprint(*names: str) -> str:
    return f"fp_{hashlib.sha256(chr(0).join(names).encode()).hexdigest()[:10]}"
