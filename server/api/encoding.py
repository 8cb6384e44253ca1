"""Prompts to tokens without stalling other clients' streams: long ones are encoded on a worker thread."""

from __future__ import annotations

import asyncio
from collections.abc import Mapping, Sequence
from typing import Any

from server.api.errors import invalid
from server.api.interfaces import TextLayerLike

# About a millisecond of encoding: less than a thread's hand-over is worth.
_INLINE_CHARS = 4096


async def encode_text(text: TextLayerLike, prompt: str) -> list[int]:
    """A prompt's tokens."""
    if len(prompt) <= _INLINE_CHARS:
        return text.encode(prompt)
    return await asyncio.to_thread(text.encode, prompt)


async def encode_chat(text: TextLayerLike, messages: Sequence[Mapping[str, Any]]) -> list[int]:
    """Raises ApiError 400 where the model's chat template refuses the messages."""
    try:
        if sum(len(message["content"]) for message in messages) <= _INLINE_CHARS:
            return text.encode_chat(messages)
        return await asyncio.to_thread(text.encode_chat, messages)
    except ValueError as error:
        raise invalid(str(error), "messages", "invalid_value") from None
