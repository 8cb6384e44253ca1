"""`POST /v1/chat/completions`."""

from __future__ import annotations

from aiohttp import web

from server.api.access.auth import caller_of, check_priority
from server.api.encoding import encode_chat
from server.api.engine_requests import context_length, engine_requests
from server.api.formats import ChatFormat
from server.api.identity import head, new_id
from server.api.jobs import defaults_for, job_of, wording_of
from server.api.messages import plain_messages
from server.api.options import chat_options
from server.api.parsing import parse_body
from server.api.prediction import prediction_ids
from server.api.respond import read_body, respond
from server.api.schemas import ChatRequest
from server.api.state import STATE


async def chat_completions(request: web.Request) -> web.StreamResponse:
    """One conversation, `n` answers to it, whole or streamed."""
    state = request.app[STATE]
    arrival, caller = state.metrics.clock(), caller_of(request)
    body = parse_body(await read_body(request, state), ChatRequest)
    options = chat_options(body, request.headers, defaults_for(caller, state), state.limits)
    messages = plain_messages(body.messages)
    priority = check_priority(caller, options.priority)
    arm = state.route(request, body.model, body.user or body.safety_identifier)
    info, text = arm.require_ready()
    prompt = await encode_chat(text, messages, info=info)
    request_id = new_id("chatcmpl")
    requests = engine_requests(
        request_id,
        body,
        options,
        info,
        [prompt],
        param="messages",
        prediction_ids=await prediction_ids(text, body.prediction, context_length(info)[0]),
        tenant=caller.tenant,
        priority=priority,
    )
    style = ChatFormat(head(request_id, arm, state.version), text, wording_of(options, [prompt]))
    return await respond(request, state, arm, job_of(request_id, requests, options, style, arrival))
