"""Background requests of the server's own: sent to an engine, heard to their end."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Sequence

from server.api.interfaces import EngineClientLike
from server.core import FinishReason, Request, SamplingParams, SpeculationParams, StepOutput, TokenLogprobs
from server.engine.errors import EngineUnavailable
from server.routing.replay.comparison import Answer, Scores

NUM_SCORED = 20
"""Most probable tokens that are asked for where answers part."""


LOOK_S = 0.01
"""How often it is looked whether another engine of the device is busy, while copies are under way."""

Busy = Callable[[], bool]
"""Whether users' requests are under way on another engine that computes on the same device."""


class CopyError(Exception):
    """The engine did not answer it; the message says why."""


class _CopySink:
    """Collects one request's outputs."""

    def __init__(self) -> None:
        self.tokens: list[int] = []
        self.logprobs: list[TokenLogprobs] = []
        self.first = self.last = 0.0
        self.done: asyncio.Future[None] = asyncio.get_running_loop().create_future()

    def started(self) -> None:
        """Nobody asks."""

    def put(self, output: StepOutput) -> None:
        if self.done.done():
            return
        if output.token_ids:
            self.last = time.perf_counter()
            self.first = self.first or self.last
        self.tokens += output.token_ids
        self.logprobs += output.logprobs or []
        if output.finish_reason in (FinishReason.ERROR, FinishReason.ABORT):
            self.done.set_exception(CopyError(output.error or output.finish_reason.value))
        elif output.finish_reason is not None:
            self.done.set_result(None)

    def fail(self, error: EngineUnavailable) -> None:
        if not self.done.done():
            self.done.set_exception(CopyError(str(error)))


async def answered(engine: EngineClientLike, request: Request, busy: Busy | None = None) -> Answer:
    """What the engine says to `request`, to its end; cancelled, the request is aborted. Raises CopyError.

    It waits, and stands aside, while others of the device are `busy` (None: there are none).
    """
    sink = await _heard(engine, request, busy)
    num_after = len(sink.tokens) - 1
    return Answer(sink.tokens, (sink.last - sink.first) / num_after if num_after > 0 else None)


async def scored(
    engine: EngineClientLike, prompt_ids: Sequence[int], request_id: str, busy: Busy | None = None
) -> Scores:
    """What the engine gives the token after `prompt_ids`: prompt scoring takes nothing from the prefix cache, so it is
    computed from the tokens alone. `busy` as for `answered`. Raises CopyError."""
    request = Request(
        request_id,
        list(prompt_ids),
        SamplingParams(temperature=0.0, logprobs=NUM_SCORED),
        SpeculationParams(enabled=False),
        max_tokens=1,
        ignore_eos=True,
        prompt_logprobs=0,
        background=True,
    )
    sink = await _heard(engine, request, busy)
    if not sink.logprobs:
        raise CopyError("the engine gave no log-probabilities")
    return Scores.of(sink.logprobs[0])


async def _heard(engine: EngineClientLike, request: Request, busy: Busy | None) -> _CopySink:
    while busy is not None and busy():  # noqa: ASYNC110 - other processes count in shared memory, which tells nobody
        await asyncio.sleep(LOOK_S)
    sink = _CopySink()
    try:
        engine.submit(request, sink)
    except (EngineUnavailable, ValueError) as error:
        raise CopyError(str(error)) from error
    aside = None if busy is None else asyncio.create_task(_stand_aside(engine, request.request_id, busy))
    try:
        await sink.done
    finally:
        if aside is not None:
            aside.cancel()
        if not sink.done.done() or sink.done.cancelled():
            engine.abort(request.request_id)
    return sink


async def _stand_aside(engine: EngineClientLike, request_id: str, busy: Busy) -> None:
    """Suspends the request whenever others are busy; an engine sees to its own users by itself."""
    held = False
    while True:
        await asyncio.sleep(LOOK_S)
        if busy() != held:
            held = not held
            (engine.hold if held else engine.resume)(request_id)
