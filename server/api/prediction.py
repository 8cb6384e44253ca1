"""OpenAI's `prediction`: what the client expects the answer to be, as draft tokens. It never changes the text."""

from __future__ import annotations

import asyncio

from server.api.encoding import INLINE_CHARS
from server.api.interfaces import TextLayerLike
from server.api.messages import content_text
from server.api.schemas import Prediction

# No answer is longer than the context, and few tokens stand for more text than this.
_CHARS_PER_TOKEN = 16


async def prediction_ids(text: TextLayerLike, prediction: Prediction | None, max_tokens: int) -> list[int]:
    """The prediction's first tokens, at most `max_tokens`; what it spells like a special token stays text.

    Raises ApiError 400 for parts that are no text.
    """
    if prediction is None:
        return []
    # As elsewhere parts are one text; of a text that can not fit only the beginning is worth encoding.
    content = content_text(prediction.content, "prediction")[: max_tokens * _CHARS_PER_TOKEN]
    if len(content) <= INLINE_CHARS:
        return text.encode_plain(content)[:max_tokens]
    return (await asyncio.to_thread(text.encode_plain, content))[:max_tokens]
