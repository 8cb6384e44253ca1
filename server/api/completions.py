"""`POST /v1/completions`."""

from __future__ import annotations

import contextlib
from typing import Any

import msgspec
from aiohttp import web

from server.api.access.auth import caller_of, check_priority
from server.api.echo import Echo
from server.api.encoding import encode_text
from server.api.engine_requests import check_token_ids, engine_requests
from server.api.errors import ApiError, invalid
from server.api.formats import CompletionFormat
from server.api.identity import head, new_id
from server.api.interfaces import TextLayerLike
from server.api.jobs import defaults_for, job_of, wording_of
from server.api.options import completion_options
from server.api.parsing import parse_body
from server.api.respond import read_body, respond
from server.api.schemas import CompletionRequest
from server.api.state import STATE
from server.engine.messages import EngineInfo

Prompt = str | list[int]


async def completions(request: web.Request) -> web.StreamResponse:
    """One or more prompts, `n` continuations of each; choice `i` belongs to prompt `i // n`."""
    state = request.app[STATE]
    arrival, caller = state.metrics.clock(), caller_of(request)
    body = parse_body(await read_body(request, state), CompletionRequest)
    prompts = prompt_list(body.prompt)
    options = completion_options(body, request.headers, defaults_for(caller, state), state.limits, len(prompts))
    priority = check_priority(caller, options.priority)
    arm = state.route(request, body.model, body.user or body.safety_identifier)
    info, text = arm.require_ready()
    prompt_ids = [await _token_ids(prompt, text, info) for prompt in prompts]
    request_id = new_id("cmpl")
    requests = engine_requests(
        request_id, body, options, info, prompt_ids, param="prompt", tenant=caller.tenant, priority=priority
    )
    echoes = [Echo(text, *pair) for pair in zip(prompts, prompt_ids, strict=True)] if options.echo else []
    style = CompletionFormat(head(request_id, arm, state.version), text, wording_of(options, prompt_ids, echoes))
    return await respond(request, state, arm, job_of(request_id, requests, options, style, arrival, echoes))


def prompt_list(prompt: Any) -> list[Prompt]:
    """One entry a prompt, text or token ids. Raises ApiError for any other shape."""
    if isinstance(prompt, str):
        return [prompt]
    if isinstance(prompt, list) and prompt:
        shapes: dict[type, Any] = {str: list[str], list: list[list[int]]}
        with contextlib.suppress(msgspec.ValidationError):  # what it should have been is said below
            checked: Any = msgspec.convert(prompt, shapes.get(type(prompt[0]), list[int]))
            return [checked] if isinstance(checked[0], int) else checked
    raise _bad_prompt("expected a string, a list of strings, a list of token ids or a list of lists of token ids")


def _bad_prompt(reason: str) -> ApiError:
    return invalid(f"Invalid value for 'prompt': {reason}.", "prompt", "invalid_value")


async def _token_ids(prompt: Prompt, text: TextLayerLike, info: EngineInfo) -> list[int]:
    token_ids = await encode_text(text, prompt, info=info) if isinstance(prompt, str) else prompt
    if not token_ids:
        raise _bad_prompt("it has no tokens; at least one is needed")
    check_token_ids(token_ids, info.vocab_size, "prompt")
    return token_ids
