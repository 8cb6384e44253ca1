"""Prompts to tokens without stalling other clients' streams: long ones are encoded on a worker thread."""

from __future__ import annotations

import asyncio
from collections.abc import Mapping, Sequence
from typing import Any

from server.api.errors import invalid
from server.api.interfaces import TextLayerLike

INLINE_CHARS = 4096
"""About a millisecond of encoding: less than a thread's hand-over is worth."""


async def encode_text(text: TextLayerLike, prompt: str, *, add_special_tokens: bool = True) -> list[int]:
    """A prompt's tokens."""
    if len(prompt) <= INLINE_CHARS:
        return text.encode(prompt, add_special_tokens=add_special_tokens)
    return await asyncio.to_thread(text.encode, prompt, add_special_tokens=add_special_tokens)


async def encode_chat(
    text: TextLayerLike, messages: Sequence[Mapping[str, Any]], *, add_generation_prompt: bool = True
) -> list[int]:
    """Raises ApiError 400 where the model's chat template refuses the messages."""
    try:
        if sum([len(message["content"]) for message in messages]) + 64 * len(messages) <= INLINE_CHARS:
            return text.encode_chat(messages, add_generation_prompt=add_generation_prompt)
        return await asyncio.to_thread(text.encode_chat, messages, add_generation_prompt=add_generation_prompt)
    except ValueError as error:
        raise invalid(str(error), "messages", "invalid_value") from None
