"""What the HTTP surface asks of the engine's client and of the text layer."""

from __future__ import annotations

from collections.abc import AsyncGenerator, Callable, Collection, Mapping, Sequence
from typing import Any, Protocol

from server.core import Request, StepOutput
from server.engine.messages import EngineFrame, EngineInfo, EngineStats


class EngineClientLike(Protocol):
    """The engine as the API process sees it: asyncio, no torch.

    `submit` yields one `StepOutput` a step; closing the generator aborts the request in the engine.
    `failure` is why the engine is not ready, where that is known. Raises `EngineUnavailable`.
    """

    on_frame: Callable[[EngineFrame], None] | None

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

    async def start(self) -> None: ...

    async def wait_ready(self) -> EngineInfo: ...

    def submit(self, request: Request) -> AsyncGenerator[StepOutput, None]: ...

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

    def encode(self, text: str) -> list[int]:
        """A prompt's tokens, with the special tokens that the model's own tokenizer adds."""

    def encode_chat(self, messages: Sequence[Mapping[str, Any]]) -> list[int]:
        """The chat template over `messages`, ready for the assistant's turn. ValueError where it refuses them."""

    def token_bytes(self, token_id: int) -> bytes: ...

    def detokenizer(self) -> DetokenizerLike: ...

    def stop_matcher(self, stop: Sequence[str]) -> StopMatcherLike: ...
