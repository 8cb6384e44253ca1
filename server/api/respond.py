"""Runs one client request's choices and answers whole or as a stream. Both read the same deltas."""

from __future__ import annotations

import asyncio
import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

import orjson
from aiohttp import web

from server.api.access import body
from server.api.access.access_log import Record, record_of
from server.api.access.auth import caller_of
from server.api.arm import Arm
from server.api.arms import KEY
from server.api.choice_text import ChoiceText, Delta
from server.api.chunks import ChunkWriter
from server.api.echo import Echo
from server.api.errors import ApiError, as_api_error, request_timeout
from server.api.formats import Choice, Format, Json, usage_of
from server.api.generation import Generation, Heard, Part
from server.api.spec_metrics import spec_decoding_metrics
from server.api.sse import DONE, EventStream, Flow, event
from server.api.state import ServerState
from server.api.traces import PARTS
from server.core import Request


@dataclass(frozen=True, slots=True)
class Job:
    """One client request, ready to run. `requests` are `n` a prompt, in the order of the choices' indices.

    `arrival` is on the metrics' clock, `timeout_s` counts from there. `discard` drops what is generated. Of every
    prompt's `n` choices the `num_returned` best are returned (None: all of them); those need log-probabilities.
    """

    request_id: str
    requests: list[Request]
    n: int
    stop: list[str]
    format: Format
    stream: bool
    include_usage: bool
    arrival: float
    timeout_s: float | None = None
    skip_special_tokens: bool = True
    annotate: bool = False
    spec_metrics: str = "none"
    discard: bool = False
    num_returned: int | None = None
    continuous_usage: bool = False
    echoes: Sequence[Echo] = ()


async def read_body(request: web.Request, state: ServerState) -> bytes:
    """The body of a request that there is room for. Raises ApiError: 429 before that, then what is wrong."""
    state.require_room()
    return await body.read_body(request, state.limits.max_body_bytes, state.config.body_timeout_s)


async def respond(request: web.Request, state: ServerState, arm: Arm, job: Job) -> web.StreamResponse:
    """Admits the job, runs it and answers. However this is left, no request stays behind in the engine."""
    key = caller_of(request).key
    num_prompt = _num_prompt(job)
    watch = state.watch if state.watch is not None and KEY in request and arm.name in state.watch.arms else None
    try:
        arm.admit(job.requests)
    except ApiError:
        if watch is not None:  # its queue is full: to the client that is an error like any other
            watch.refused(arm.name, request[KEY])
        raise
    place = _Place(arm, job.requests)
    parts: list[Part] = []
    running = arm.engine.stats.num_running
    copies = [] if state.replays is None or job.discard else state.replays.wanted(arm, job.requests[0])
    try:
        state.access.limiter.reserve(key, num_prompt)
        parts = _parts(state, arm, job, watched=watch is not None, heard=bool(copies))
        request[PARTS] = parts
        state.metrics.of(arm.name).admitted(num_prompt)
        answer = _Streamed(request, state, arm, job, parts) if job.stream else _Whole(arm, job, parts)
        return await _run(state, arm, job, parts, answer, place)
    finally:
        place.give_back()
        state.access.limiter.charge(key, sum(part.text.tally.num_completion for part in parts))
        _note(record_of(request), arm.model_name, job, parts)
        if watch is not None:
            watch.note(arm.name, request[KEY], running, parts)
        if state.replays is not None and copies and parts:
            state.replays.begin(copies, parts[0])


def _note(record: Record, model: str, job: Job, parts: list[Part]) -> None:
    """What the access log says of it."""
    record.model = model
    record.stream = job.stream
    record.prompt_tokens = _num_prompt(job)
    record.completion_tokens = sum(part.text.tally.num_completion for part in parts)
    record.finish_reasons = [part.timer.reason.value for part in parts if part.timer.reason is not None]
    ttft_s = min((part.timer.ttft_s for part in parts if part.timer.ttft_s is not None), default=None)
    record.ttft_ms = None if ttft_s is None else ttft_s * 1e3


def _parts(state: ServerState, arm: Arm, job: Job, *, watched: bool, heard: bool) -> list[Part]:
    _, text = arm.require_ready()
    parts = [
        Part(
            request,
            ChoiceText(
                index,
                request,
                text,
                job.stop,
                skip_special_tokens=job.skip_special_tokens,
                annotate=job.annotate,
                keep_steps=job.spec_metrics != "none",
                discard=job.discard,
                keep_text=watched,
            ),
            state.metrics.of(arm.name).choice_timer(job.arrival, len(request.prompt_ids), request.max_tokens),
        )
        for index, request in enumerate(job.requests)
    ]
    if watched:
        parts[0].timer.gaps = []
    if heard:
        parts[0] = replace(parts[0], heard=Heard())
    return parts


class _Place:
    """What a job holds of the queue: until the engine has done with it, however long its client then takes to read."""

    def __init__(self, arm: Arm, requests: list[Request]) -> None:
        self._arm = arm
        self._requests: list[Request] | None = requests

    def give_back(self) -> None:
        if self._requests is not None:
            self._arm.leave(self._requests)
            self._requests = None


async def _run(
    state: ServerState, arm: Arm, job: Job, parts: list[Part], answer: _Whole | _Streamed, place: _Place
) -> web.StreamResponse:
    """Generates and answers, under the job's deadline."""
    generation = Generation(arm.engine, parts, answer.take)
    generation.on_end(place.give_back)
    deadline: asyncio.TimerHandle | None = None
    if job.timeout_s is not None:
        left = job.arrival + job.timeout_s - state.metrics.clock()
        deadline = asyncio.get_running_loop().call_later(left, generation.fail, request_timeout(job.timeout_s))
    try:
        generation.start()
        return await answer.run(generation)
    finally:
        if deadline is not None:
            deadline.cancel()
        generation.close()


def _num_prompt(job: Job) -> int:
    return sum(len(request.prompt_ids) for request in job.requests[:: job.n])


def _usage(job: Job, parts: list[Part]) -> Json:
    """Of a prompt with several choices the first tells what was cached: the others find what it has just left."""
    num_cached = sum(part.text.tally.num_cached for part in parts[:: job.n])
    return usage_of(_num_prompt(job), [part.text.tally for part in parts], num_cached)


def _metrics(arm: Arm, job: Job, parts: list[Part]) -> Json:
    """`metrics`, where asked for. They describe one sequence: null for several choices, as vLLM has it."""
    if job.spec_metrics == "none":
        return {}
    info = arm.engine.info
    if len(parts) != 1 or info is None:
        return {"metrics": None}
    detailed = job.spec_metrics == "detailed"
    tally = parts[0].text.tally
    return {"metrics": {"speculative_decoding": spec_decoding_metrics(tally, info.max_draft_tokens, detailed=detailed)}}


class _Whole:
    """Collects everything, then answers."""

    def __init__(self, arm: Arm, job: Job, parts: list[Part]) -> None:
        self._arm = arm
        self._job = job
        self._parts = parts
        self._choices = [Choice() for _ in parts]
        self._texts: list[list[str]] = [[] for _ in parts]

    def take(self, delta: Delta) -> None:
        self._texts[delta.index].append(delta.text)
        self._choices[delta.index].take(delta)
        if delta.prompt_logprobs is not None and self._job.echoes:
            self._job.echoes[delta.index // self._job.n].score(delta.prompt_logprobs)

    async def run(self, generation: Generation) -> web.Response:
        await generation.wait()
        for choice, texts in zip(self._choices, self._texts, strict=True):
            choice.text = "".join(texts)
        job = self._job
        answer = job.format.whole(self._returned(), _usage(job, self._parts))
        answer |= _metrics(self._arm, job, self._parts)
        return web.Response(body=orjson.dumps(answer), content_type="application/json")

    def _returned(self) -> list[Choice]:
        n, num_returned = self._job.n, self._job.num_returned
        if num_returned is None:
            return self._choices
        best: list[Choice] = []
        for start in range(0, len(self._choices), n):
            best += sorted(self._choices[start : start + n], key=_mean_logprob, reverse=True)[:num_returned]
        return best


def _mean_logprob(choice: Choice) -> float:
    """What `best_of` compares: the log-probability per token."""
    if not choice.logprobs:
        return -math.inf
    return sum(entry.token.logprob for entry in choice.logprobs) / len(choice.logprobs)


class _Streamed:
    """Sends deltas as they come. The answer begins with the first one: an earlier failure has its own status."""

    def __init__(self, request: web.Request, state: ServerState, arm: Arm, job: Job, parts: list[Part]) -> None:
        self._job = job
        self._state = state
        self._arm = arm
        self._parts = parts
        self._writer = ChunkWriter(job.format)
        self._request = request
        self._events: EventStream | None = None
        self._begun: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self._early: list[bytes] = []
        self._last = b""

    def take(self, delta: Delta) -> None:
        if delta.prompt_logprobs is not None and self._job.echoes:
            self._job.echoes[delta.index // self._job.n].score(delta.prompt_logprobs)
        if delta.finish_reason is not None and self._job.spec_metrics != "none" and not self._job.include_usage:
            data = self._events_of(delta, _metrics(self._arm, self._job, self._parts))
        elif self._job.continuous_usage:
            data = self._events_of(delta, {})
        else:
            data = self._writer.chunk(delta)
        if not data:
            return
        if delta.finish_reason is not None and len(self._parts) == 1:
            self._last = data  # goes with what ends the stream
            self._begin()
        elif self._events is not None:
            self._events.push(data, len(delta.token_ids))
        else:
            self._early.append(data)
            self._begin()

    def _events_of(self, delta: Delta, end: Json) -> bytes:
        """A delta's events with the usage so far, where that is asked for; `end` goes into the last one."""
        chunks = self._writer.chunks(delta)
        if self._job.continuous_usage:
            chunks = [{**chunk, "usage": _usage(self._job, self._parts)} for chunk in chunks]
        if chunks:
            chunks[-1] |= end
        return b"".join(map(event, chunks))

    def _begin(self) -> None:
        if not self._begun.done():
            self._begun.set_result(None)

    async def run(self, generation: Generation) -> web.StreamResponse:
        job, state = self._job, self._state
        generation.on_end(self._begin)
        await self._begun
        if not self._early and not self._last:  # it failed before there was anything to send
            await generation.wait()
        flow = Flow(
            state.config.stream_buffer_tokens,
            state.config.stall_timeout_s,
            generation.hold,
            generation.resume,
            state.metrics.slow_clients_dropped.inc,
        )
        events = EventStream(self._request, {}, flow)
        try:
            openings = [job.format.opening(index) for index in range(len(self._parts))]
            first = b"".join([event(opening) for opening in openings if opening is not None] + self._early)
            self._events = events
            await events.open(first)
            await events.finish(await self._ending(generation))
            return events.response
        finally:
            events.close()

    async def _ending(self, generation: Generation) -> bytes:
        """The last events: usage and `[DONE]`, or the error that ended the stream, after which nothing comes."""
        job = self._job
        try:
            await generation.wait()
        except ConnectionError:
            raise
        except Exception as error:  # noqa: BLE001 - the status is sent already: whatever it is goes into the stream
            told = as_api_error(error)
            record_of(self._request).error_code = told.code or told.type
            return event(told.body())
        if not job.include_usage:
            return self._last + DONE
        usage = job.format.usage_chunk(_usage(job, self._parts)) | _metrics(self._arm, job, self._parts)
        return self._last + event(usage) + DONE
