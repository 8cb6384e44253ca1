"""Prompts to tokens without stalling other clients' streams: long ones are encoded on a worker thread."""

from __future__ import annotations

import asyncio
from collections.abc import Mapping, Sequence
from typing import Any

from server.api.engine_requests import context_length
from server.api.errors import ApiError, invalid
from server.api.interfaces import TextLayerLike
from server.engine.messages import EngineInfo
from server.text.errors import TooManyTokens

INLINE_CHARS = 4096
"""About a millisecond of encoding: less than a thread's hand-over is worth."""


async def encode_text(
    text: TextLayerLike, prompt: str, *, add_special_tokens: bool = True, info: EngineInfo | None = None
) -> list[int]:
    """A prompt's tokens. Raises ApiError 400, before they are found, where it surely does not fit `info`'s context."""
    limit = None if info is None else context_length(info)[0]
    try:
        if len(prompt) <= INLINE_CHARS:
            return text.encode(prompt, add_special_tokens=add_special_tokens, max_tokens=limit)
        return await asyncio.to_thread(text.encode, prompt, add_special_tokens=add_special_tokens, max_tokens=limit)
    except TooManyTokens as error:
        assert info is not None
        raise _too_long(info, error.at_least, "prompt") from None


async def encode_chat(
    text: TextLayerLike,
    messages: Sequence[Mapping[str, Any]],
    *,
    add_generation_prompt: bool = True,
    info: EngineInfo | None = None,
) -> list[int]:
    """Raises ApiError 400 where the model's chat template refuses the messages, and as `encode_text` does."""
    options: dict[str, Any] = {"add_generation_prompt": add_generation_prompt}
    options["max_tokens"] = None if info is None else context_length(info)[0]
    try:
        if sum([len(message["content"]) for message in messages]) + 64 * len(messages) <= INLINE_CHARS:
            return text.encode_chat(messages, **options)
        return await asyncio.to_thread(text.encode_chat, messages, **options)
    except TooManyTokens as error:
        assert info is not None
        raise _too_long(info, error.at_least, "messages") from None
    except ValueError as error:
        raise invalid(str(error), "messages", "invalid_value") from None


def _too_long(info: EngineInfo, at_least: int, param: str) -> ApiError:
    limit, what = context_length(info)
    return invalid(
        f"{what[0].upper()}{what[1:]} {limit} tokens. However, your {param} has at least {at_least} tokens. "
        f"Please reduce the length of the {param}.",
        param,
        "context_length_exceeded",
    )
