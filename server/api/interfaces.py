"""What the HTTP surface asks of the engine's client and of the text layer."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from typing import Any, Protocol

from server.core import Request
from server.engine.connection import Sink
from server.engine.messages import EngineInfo, EngineStats


class EngineClientLike(Protocol):
    """The engine as the API process sees it: asyncio, no torch.

    `submit` hands one `StepOutput` a step to the request's sink, until one has a finish reason or the sink is told that
    the engine failed; it raises EngineUnavailable where the engine is not ready. `abort` ends a request, `hold` and
    `resume` suspend it. `failure` is why the engine is not ready, where that is known.
    """

    on_stats: Callable[[EngineStats], None] | None

    @property
    def ready(self) -> bool: ...

    @property
    def info(self) -> EngineInfo | None: ...

    @property
    def stats(self) -> EngineStats: ...

    @property
    def failure(self) -> str | None: ...

    @property
    def num_restarts(self) -> int: ...

    @property
    def pid(self) -> int | None: ...

    async def start(self) -> None: ...

    async def wait_ready(self) -> EngineInfo: ...

    def submit(self, request: Request, sink: Sink) -> None: ...

    def abort(self, request_id: str) -> None: ...

    def hold(self, request_id: str) -> None: ...

    def resume(self, request_id: str) -> None: ...

    async def drain(self, timeout_s: float) -> None: ...

    async def close(self) -> None: ...


class DetokenizerLike(Protocol):
    """Token ids to text, a piece a token; text that may still change is held back."""

    def feed(self, ids: Sequence[int]) -> list[str]: ...

    def flush(self) -> str: ...


class StopMatcherLike(Protocol):
    """Text up to the first stop string: `feed` returns what is safe to send, `matched` is the stop string found."""

    @property
    def matched(self) -> str | None: ...

    def feed(self, text: str) -> str: ...

    def flush(self) -> str: ...


class TextLayerLike(Protocol):
    """Tokenizer, chat template, detokenizers and stop matchers of the served model."""

    @property
    def eos_token_ids(self) -> Collection[int]: ...

    def encode(self, text: str, *, add_special_tokens: bool = True, max_tokens: int | None = None) -> list[int]:
        """A prompt's tokens, with the special tokens that the model's own tokenizer adds around it.

        May raise TooManyTokens where they are more than `max_tokens`.
        """

    def encode_plain(self, text: str) -> list[int]:
        """A text's tokens and nothing around them; spellings of special tokens stay text."""

    def encode_chat(
        self,
        messages: Sequence[Mapping[str, Any]],
        *,
        add_generation_prompt: bool = True,
        max_tokens: int | None = None,
    ) -> list[int]:
        """The chat template over `messages`, ready for the assistant's turn. ValueError where it refuses them.

        May raise TooManyTokens where they are more than `max_tokens`.
        """

    def token_bytes(self, token_id: int) -> bytes: ...

    def detokenizer(self, *, skip_special_tokens: bool = True) -> DetokenizerLike: ...

    def stop_matcher(self, stop: Sequence[str]) -> StopMatcherLike: ...
