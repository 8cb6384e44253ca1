"""One choice from engine steps to text, and many choices merged into one stream.

Tokens are taken one by one however many a step emits, so that a stop string is found at the token that
completes it. What may still turn into a stop string is held back, and so are its log-probabilities.
"""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import AsyncGenerator, Collection, Sequence
from contextlib import aclosing
from dataclasses import dataclass

from server.api.errors import engine_failed, engine_unavailable
from server.api.interfaces import EngineClientLike, TextLayerLike
from server.core import FinishReason, Request, StepOutput, TokenLogprobs
from server.telemetry.metrics import ChoiceTimer


@dataclass(frozen=True, slots=True)
class TextLogprobs:
    """A token of the returned text; `text_offset` is where it starts there, in characters."""

    token: TokenLogprobs
    text_offset: int


@dataclass(frozen=True, slots=True)
class Delta:
    """What one step adds to choice `index`: possibly no text at all, while text is held back."""

    index: int
    text: str
    logprobs: list[TextLogprobs]
    finish_reason: FinishReason | None = None


@dataclass(slots=True)
class Tally:
    """What one choice used. `num_accepted` and `num_drafted` count draft tokens, never the bonus token."""

    num_completion: int = 0
    num_cached: int = 0
    num_accepted: int = 0
    num_drafted: int = 0


class ChoiceText:
    """Turns one choice's steps into deltas."""

    def __init__(self, index: int, request: Request, text: TextLayerLike, stop: Sequence[str]) -> None:
        self._index = index
        self._end_ids = _end_ids(request, text.eos_token_ids)
        self._detokenizer = text.detokenizer()
        self._matcher = text.stop_matcher(stop) if stop else None
        self._pending: deque[TextLogprobs] = deque()
        self._num_decoded = 0
        self._num_released = 0
        self.tally = Tally()

    def step(self, output: StepOutput) -> Delta:
        """Raises ApiError if the engine gave the request up."""
        _raise_if_failed(output)
        if output.num_cached is not None:
            self.tally.num_cached = output.num_cached
        ends_with_stop = output.finish_reason is FinishReason.STOP and output.token_ids[-1:] != []
        num_text = len(output.token_ids)
        if ends_with_stop and output.token_ids[-1] in self._end_ids:
            num_text -= 1
        pieces, stopped, num_taken = self._take(output, num_text)
        self._count(output, num_taken if stopped else len(output.token_ids))
        finish = FinishReason.STOP if stopped else output.finish_reason
        if finish is not None and not stopped:
            tail, stopped = self._finish()
            pieces.append(tail)
            finish = FinishReason.STOP if stopped else finish
        text = "".join(pieces)
        self._num_released += len(text)
        return Delta(self._index, text, self._release(final=finish is not None and not stopped), finish)

    def _take(self, output: StepOutput, num_text: int) -> tuple[list[str], bool, int]:
        pieces: list[str] = []
        for position in range(num_text):
            if output.logprobs is not None:
                self._pending.append(TextLogprobs(output.logprobs[position], self._num_decoded))
            text, stopped = self._match(self._detokenizer.feed(output.token_ids[position : position + 1])[0])
            pieces.append(text)
            if stopped:
                return pieces, True, position + 1
        return pieces, False, num_text

    def _match(self, text: str) -> tuple[str, bool]:
        self._num_decoded += len(text)
        if self._matcher is None or not text:
            return text, False
        return self._matcher.feed(text), self._matcher.matched is not None

    def _finish(self) -> tuple[str, bool]:
        """What was held back: the detokenizer's last bytes may still complete a stop string."""
        text, stopped = self._match(self._detokenizer.flush())
        if not stopped and self._matcher is not None:
            text += self._matcher.flush()
            stopped = self._matcher.matched is not None
        return text, stopped

    def _release(self, final: bool) -> list[TextLogprobs]:
        released = []
        while self._pending and (final or self._pending[0].text_offset < self._num_released):
            released.append(self._pending.popleft())
        return released

    def _count(self, output: StepOutput, num_taken: int) -> None:
        self.tally.num_completion += num_taken
        self.tally.num_drafted += output.num_drafted
        self.tally.num_accepted += min(output.num_accepted, num_taken)


def _end_ids(request: Request, eos_token_ids: Collection[int]) -> frozenset[int]:
    """Tokens that end the text and are no part of it."""
    return frozenset(request.stop_token_ids) | frozenset(() if request.ignore_eos else eos_token_ids)


def _raise_if_failed(output: StepOutput) -> None:
    if output.finish_reason is FinishReason.ERROR:
        raise engine_failed(output.error)
    if output.finish_reason is FinishReason.ABORT:
        raise engine_unavailable(output.error or "The engine gave this request up because it is shutting down.")


async def run_choice(
    engine: EngineClientLike, request: Request, choice: ChoiceText, timer: ChoiceTimer
) -> AsyncGenerator[Delta, None]:
    """The deltas of one choice. Leaving early, for whatever reason, aborts the request in the engine."""
    reason = FinishReason.ABORT
    try:
        async with aclosing(engine.submit(request)) as outputs:
            async for output in outputs:
                timer.observe_step(len(output.token_ids))
                delta = choice.step(output)
                reason = delta.finish_reason or reason
                if delta.text or delta.logprobs or delta.finish_reason:
                    yield delta
                if delta.finish_reason is not None:
                    return
        raise engine_unavailable("The engine ended this request without saying why.")
    except Exception:
        reason = FinishReason.ERROR
        raise
    finally:
        timer.finish(reason, choice.tally.num_completion)


async def merge(streams: Sequence[AsyncGenerator[Delta, None]]) -> AsyncGenerator[Delta, None]:
    """All streams' deltas as they come. The first failure ends all; leaving early closes all."""
    if len(streams) == 1:
        async with aclosing(streams[0]) as only:
            async for delta in only:
                yield delta
        return
    queue: asyncio.Queue[Delta | Exception | None] = asyncio.Queue()
    tasks = [asyncio.create_task(_pump(stream, queue)) for stream in streams]
    try:
        num_left = len(tasks)
        while num_left:
            item = await queue.get()
            if item is None:
                num_left -= 1
            elif isinstance(item, Exception):
                raise item
            else:
                yield item
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)


async def _pump(stream: AsyncGenerator[Delta, None], queue: asyncio.Queue[Delta | Exception | None]) -> None:
    try:
        async with aclosing(stream) as deltas:
            async for delta in deltas:
                queue.put_nowait(delta)
    except Exception as error:  # noqa: BLE001 - handed to the reader of the queue, which raises it
        queue.put_nowait(error)
    else:
        queue.put_nowait(None)
