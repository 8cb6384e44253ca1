"""`POST /tokenize` and `/detokenize`, as vLLM has them."""

from __future__ import annotations

import asyncio
from typing import Any

from aiohttp import web

from server.api.access.body import read_body
from server.api.encoding import INLINE_CHARS, encode_chat, encode_text
from server.api.engine_requests import check_token_ids
from server.api.errors import invalid
from server.api.formats import token_string
from server.api.interfaces import TextLayerLike
from server.api.messages import plain_messages
from server.api.parsing import parse_body
from server.api.routes import json_response
from server.api.schemas import DetokenizeRequest, TokenizeRequest
from server.api.state import STATE, ServerState


async def _body(request: web.Request, state: ServerState) -> bytes:
    """Unlike a completion's it is read when the queue is full too: nothing here waits for the engine."""
    return await read_body(request, state.limits.max_body_bytes, state.config.body_timeout_s)


async def tokenize(request: web.Request) -> web.Response:
    """A text's or a conversation's tokens, exactly as a completion would have them."""
    state = request.app[STATE]
    body = parse_body(await _body(request, state), TokenizeRequest)
    _check_form(body)
    messages = None if body.messages is None else plain_messages(body.messages)
    info, text = state.route(request, body.model).require_ready()
    if messages is not None:
        with_prompt = body.add_generation_prompt is not False
        tokens = await encode_chat(text, messages, add_generation_prompt=with_prompt)
    else:
        assert body.prompt is not None
        tokens = await encode_text(text, body.prompt, add_special_tokens=body.add_special_tokens is not False)
    answer: dict[str, Any] = {"count": len(tokens), "max_model_len": info.max_model_len, "tokens": tokens}
    if body.return_token_strs:
        answer["token_strs"] = await _token_strings(text, tokens)
    return json_response(answer)


async def _token_strings(text: TextLayerLike, tokens: list[int]) -> list[str]:
    def strings() -> list[str]:
        return [token_string(text.token_bytes(token_id)) for token_id in tokens]

    return strings() if len(tokens) <= INLINE_CHARS else await asyncio.to_thread(strings)


def _check_form(body: TokenizeRequest) -> None:
    if (body.prompt is None) == (body.messages is None):
        code = "missing_required_parameter" if body.prompt is None else "invalid_value"
        raise invalid("Give either 'prompt' or 'messages'.", "prompt", code)
    for name, other in (("add_special_tokens", "prompt"), ("add_generation_prompt", "messages")):
        if getattr(body, name) is not None and getattr(body, other) is None:
            raise invalid(f"{name!r} is only allowed with {other!r}.", name, "invalid_value")


async def detokenize(request: web.Request) -> web.Response:
    """The text of token ids, special tokens included."""
    state = request.app[STATE]
    body = parse_body(await _body(request, state), DetokenizeRequest)
    info, text = state.route(request, body.model).require_ready()
    check_token_ids(body.tokens, info.vocab_size, "tokens")
    if len(body.tokens) <= INLINE_CHARS:
        return json_response({"prompt": _text_of(text, body.tokens)})
    return json_response({"prompt": await asyncio.to_thread(_text_of, text, body.tokens)})


def _text_of(text: TextLayerLike, tokens: list[int]) -> str:
    detokenizer = text.detokenizer(skip_special_tokens=False)
    return "".join(detokenizer.feed(tokens)) + detokenizer.flush()


ROUTES = [web.post("/tokenize", tokenize), web.post("/detokenize", detokenize)]
