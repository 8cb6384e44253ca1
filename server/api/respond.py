"""Runs one client request's choices and answers whole or as a stream. Both read the same deltas."""

from __future__ import annotations

from collections.abc import AsyncGenerator
from contextlib import aclosing
from dataclasses import dataclass

import orjson
from aiohttp import web

from server.api.errors import as_api_error, invalid
from server.api.formats import Choice, Format, Json, usage_of
from server.api.generation import ChoiceText, Delta, merge, run_choice
from server.api.interfaces import TextLayerLike
from server.api.sse import EventStream
from server.api.state import ServerState
from server.core import Request


@dataclass(frozen=True, slots=True)
class Job:
    """One client request, ready to run. `requests` are `n` a prompt, in the order of the choices' indices.

    `arrival` is on the metrics' clock.
    """

    request_id: str
    requests: list[Request]
    n: int
    stop: list[str]
    format: Format
    stream: bool
    include_usage: bool
    arrival: float


async def read_body(request: web.Request) -> bytes:
    """Raises ApiError where the body is not announced as JSON, HTTPRequestEntityTooLarge where it is too long."""
    if request.content_type != "application/json":
        message = f"Content-Type {request.content_type!r} is not supported; use application/json."
        raise invalid(message, code="invalid_content_type")
    return await request.read()


async def respond(request: web.Request, state: ServerState, text: TextLayerLike, job: Job) -> web.StreamResponse:
    """Admits the job, runs it and answers. However this is left, no request stays behind in the engine."""
    with state.admit(len(job.requests)):
        choices = [ChoiceText(i, engine_request, text, job.stop) for i, engine_request in enumerate(job.requests)]
        state.metrics.prompt_tokens.inc(_num_prompt(job))
        streams = [
            run_choice(state.engine, engine_request, choice, state.metrics.choice_timer(job.arrival))
            for engine_request, choice in zip(job.requests, choices, strict=True)
        ]
        async with aclosing(merge(streams)) as deltas:
            if job.stream:
                return await _stream(request, job, choices, deltas)
            return await _whole(job, choices, deltas)


def _num_prompt(job: Job) -> int:
    return sum(len(request.prompt_ids) for request in job.requests[:: job.n])


def _usage(job: Job, choices: list[ChoiceText]) -> Json:
    """Of a prompt with several choices the first tells what was cached: the others find what it has just left."""
    num_cached = sum(choice.tally.num_cached for choice in choices[:: job.n])
    return usage_of(_num_prompt(job), [choice.tally for choice in choices], num_cached)


async def _whole(job: Job, choices: list[ChoiceText], deltas: AsyncGenerator[Delta, None]) -> web.Response:
    parts: list[list[str]] = [[] for _ in choices]
    wholes = [Choice() for _ in choices]
    async for delta in deltas:
        parts[delta.index].append(delta.text)
        wholes[delta.index].logprobs.extend(delta.logprobs)
        wholes[delta.index].finish_reason = delta.finish_reason
    for whole, texts in zip(wholes, parts, strict=True):
        whole.text = "".join(texts)
    body = orjson.dumps(job.format.whole(wholes, _usage(job, choices)))
    return web.Response(body=body, content_type="application/json", headers={"x-request-id": job.request_id})


async def _stream(
    request: web.Request, job: Job, choices: list[ChoiceText], deltas: AsyncGenerator[Delta, None]
) -> web.StreamResponse:
    """The first delta is awaited before the answer begins, so that an early failure still has its own status."""
    first = await anext(deltas)
    events = EventStream(request, {"x-request-id": job.request_id})
    await events.open()
    try:
        openings = (job.format.opening(index) for index in range(len(choices)))
        await events.send(*(opening for opening in openings if opening is not None), *job.format.chunk(first))
        async for delta in deltas:
            await events.send(*job.format.chunk(delta))
    except ConnectionError:
        raise
    except Exception as error:  # noqa: BLE001 - the status is sent already: whatever it is goes into the stream
        await events.fail(as_api_error(error).body())
        return events.response
    if job.include_usage:
        await events.send(job.format.usage_chunk(_usage(job, choices)))
    await events.done()
    return events.response
