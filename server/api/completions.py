"""`POST /v1/completions`."""

from __future__ import annotations

from typing import Any

from aiohttp import web

from server.api import params
from server.api.encoding import encode_text
from server.api.errors import ApiError, invalid
from server.api.formats import CompletionFormat
from server.api.identity import head, new_id
from server.api.interfaces import TextLayerLike
from server.api.respond import Job, read_body, respond
from server.api.schemas import CompletionRequest, parse_body
from server.api.state import STATE


async def completions(request: web.Request) -> web.StreamResponse:
    """One or more prompts, `n` continuations of each; choice `i` belongs to prompt `i // n`."""
    state = request.app[STATE]
    arrival = state.metrics.clock()
    body = parse_body(await read_body(request), CompletionRequest)
    params.refuse_unsupported_completion(body)
    prompts = prompt_list(body.prompt)
    n = params.num_choices(body, state.limits, len(prompts))
    stop, include_usage = params.stop_strings(body), params.include_usage(body)
    state.require_model(body.model)
    info, text = state.require_ready()
    prompt_ids = [await _token_ids(prompt, text, info.vocab_size) for prompt in prompts]
    max_tokens = params.COMPLETION_DEFAULT_MAX_TOKENS if body.max_tokens is None else body.max_tokens
    request_id = new_id("cmpl")
    requests = params.engine_requests(
        request_id, body, info, prompt_ids, n=n, max_tokens=max_tokens, logprobs=body.logprobs, param="prompt"
    )
    with_logprobs = body.logprobs is not None
    style = CompletionFormat(head(request_id, state), text, logprobs=with_logprobs, usage_in_chunks=include_usage)
    job = Job(request_id, requests, n, stop, style, bool(body.stream), include_usage, arrival)
    return await respond(request, state, text, job)


def prompt_list(prompt: Any) -> list[str | list[int]]:
    """One entry a prompt, text or token ids. Raises ApiError for any other shape."""
    if isinstance(prompt, str):
        return [prompt]
    if isinstance(prompt, list) and prompt:
        if all(_is_token_id(item) for item in prompt):
            return [prompt]
        if all(isinstance(item, str) for item in prompt):
            return list(prompt)
        if all(isinstance(item, list) and all(_is_token_id(token) for token in item) for item in prompt):
            return list(prompt)
    raise _bad_prompt("expected a string, a list of strings, a list of token ids or a list of lists of token ids")


def _is_token_id(item: object) -> bool:
    return isinstance(item, int) and not isinstance(item, bool)


def _bad_prompt(reason: str) -> ApiError:
    return invalid(f"Invalid value for 'prompt': {reason}.", "prompt", "invalid_value")


async def _token_ids(prompt: str | list[int], text: TextLayerLike, vocab_size: int) -> list[int]:
    token_ids = await encode_text(text, prompt) if isinstance(prompt, str) else prompt
    if not token_ids:
        raise _bad_prompt("it has no tokens; at least one is needed")
    params.check_token_ids(token_ids, vocab_size, "prompt")
    return token_ids
