"""`POST /v1/chat/completions`."""

from __future__ import annotations

from typing import Any

from aiohttp import web

from server.api import params
from server.api.encoding import encode_chat
from server.api.errors import invalid, unsupported
from server.api.formats import ChatFormat
from server.api.identity import head, new_id
from server.api.respond import Job, read_body, respond
from server.api.schemas import ChatRequest, Message, parse_body
from server.api.state import STATE

ROLES = ("system", "developer", "user", "assistant")


async def chat_completions(request: web.Request) -> web.StreamResponse:
    """One conversation, `n` answers to it, whole or streamed."""
    state = request.app[STATE]
    arrival = state.metrics.clock()
    body = parse_body(await read_body(request), ChatRequest)
    params.refuse_unsupported_chat(body)
    messages = [plain_message(message, index) for index, message in enumerate(body.messages)]
    n = params.num_choices(body, state.limits)
    stop, include_usage = params.stop_strings(body), params.include_usage(body)
    max_tokens, logprobs = params.chat_max_tokens(body), params.chat_logprobs(body)
    state.require_model(body.model)
    info, text = state.require_ready()
    prompt = await encode_chat(text, messages)
    request_id = new_id("chatcmpl")
    requests = params.engine_requests(
        request_id, body, info, [prompt], n=n, max_tokens=max_tokens, logprobs=logprobs, param="messages"
    )
    style = ChatFormat(head(request_id, state), text, logprobs=logprobs is not None, usage_in_chunks=include_usage)
    job = Job(request_id, requests, n, stop, style, bool(body.stream), include_usage, arrival)
    return await respond(request, state, text, job)


def plain_message(message: Message, index: int) -> dict[str, Any]:
    """A message as the chat template takes it. Raises ApiError where it holds what this server cannot serve."""
    where = f"messages[{index}]"
    if message.role in ("tool", "function"):
        raise unsupported(f"{where}.role {message.role!r} is not supported yet.", f"{where}.role")
    if message.role not in ROLES:
        valid = ", ".join(ROLES)
        explained = f"Invalid value for '{where}.role': {message.role!r}; use one of {valid}."
        raise invalid(explained, f"{where}.role", "invalid_value")
    for name in ("tool_calls", "function_call", "audio", "refusal"):
        if getattr(message, name):
            raise unsupported(f"{where}.{name} is not supported yet.", f"{where}.{name}")
    role = "system" if message.role == "developer" else message.role
    return {"role": role, "content": _text_of(message.content, where)}


def _text_of(content: str | list[dict[str, Any]] | None, where: str) -> str:
    if isinstance(content, str):
        return content
    if content is None:
        raise invalid(
            f"Missing required parameter: '{where}.content'.", f"{where}.content", "missing_required_parameter"
        )
    return "\n".join(_part_text(part, f"{where}.content[{i}]") for i, part in enumerate(content))


def _part_text(part: dict[str, Any], where: str) -> str:
    kind, text = part.get("type"), part.get("text")
    if kind != "text":
        raise unsupported(f"{where}.type {kind!r} is not supported; use 'text'.", f"{where}.type")
    if not isinstance(text, str):
        raise invalid(f"Invalid value for '{where}.text': expected a string.", f"{where}.text", "invalid_type")
    extra = sorted(part.keys() - {"type", "text"})
    if extra:
        message = f"Unknown parameter: '{where}.{extra[0]}'. Valid here: text, type."
        raise invalid(message, f"{where}.{extra[0]}", "unknown_parameter")
    return text
