"""A client request's choices in the engine: submitted together, ended together, their deltas handed on as they come."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

from server.api.choice_text import ChoiceText, Delta
from server.api.errors import as_api_error
from server.api.interfaces import EngineClientLike
from server.core import FinishReason, Request, StepOutput
from server.engine.errors import EngineUnavailable
from server.telemetry.arm_metrics import ChoiceTimer

Emit = Callable[[Delta], None]


@dataclass(slots=True)
class Heard:
    """What the engine said to one choice; `whole` once the engine itself ended it."""

    tokens: list[int] = field(default_factory=list)
    whole: bool = False

    def take(self, output: StepOutput) -> None:
        """One step more."""
        self.tokens += output.token_ids
        self.whole = output.finish_reason is not None


@dataclass(frozen=True, slots=True)
class Part:
    """One choice: what the engine is asked, what becomes of its tokens, and how long they take. `heard` where somebody
    wants the tokens."""

    request: Request
    text: ChoiceText
    timer: ChoiceTimer
    heard: Heard | None = None


class Generation:
    """Runs all parts at once. `emit` is called for every delta, on the event loop, straight from the engine's message.

    The first failure ends all parts. `wait` returns when all have ended and raises what went wrong; `close` aborts what
    is left and must be called however the caller leaves.
    """

    def __init__(self, engine: EngineClientLike, parts: Sequence[Part], emit: Emit) -> None:
        self._engine = engine
        self._emit = emit
        self._parts = parts
        self._open: dict[str, _PartSink] = {}
        self._held = False
        self._done: asyncio.Future[None] = asyncio.get_running_loop().create_future()

    def start(self) -> None:
        """Submits every part. Raises EngineUnavailable; then all have failed."""
        try:
            for part in self._parts:
                sink = self._open[part.request.request_id] = _PartSink(self, part)
                self._engine.submit(part.request, sink)
        except EngineUnavailable:
            self._abort_rest(FinishReason.ERROR)
            raise

    async def wait(self) -> None:
        """Raises ApiError or EngineUnavailable: whatever ended the generation early."""
        await self._done

    def on_end(self, callback: Callable[[], None]) -> None:
        """`callback` is called soon after the end, whatever it is."""
        self._done.add_done_callback(lambda _: callback())

    def fail(self, error: Exception) -> None:
        """Ends everything with `error`."""
        if not self._done.done():
            self._done.set_exception(error)
        self._abort_rest(FinishReason.ERROR)

    def hold(self) -> None:
        """The client reads too slowly: nothing more is generated until `resume`."""
        self._held = True
        for request_id in self._open:
            self._engine.hold(request_id)

    def resume(self) -> None:
        """The client has caught up."""
        if self._held:
            self._held = False
            for request_id in self._open:
                self._engine.resume(request_id)

    def close(self) -> None:
        """Aborts what is still generated: the client is gone, or the answer is complete without it."""
        self._abort_rest(FinishReason.ABORT)
        if not self._done.done():
            self._done.cancel()
        elif not self._done.cancelled():
            self._done.exception()  # whoever left before waiting knows a better reason

    def _abort_rest(self, reason: FinishReason) -> None:
        for request_id, sink in list(self._open.items()):
            self._engine.abort(request_id)
            self.end(sink, reason)

    def end(self, sink: _PartSink, reason: FinishReason) -> None:
        """`sink`'s part has ended for `reason`."""
        part = sink.part
        if self._open.pop(part.request.request_id, None) is None:
            return
        part.timer.finish(reason, part.text.tally.num_completion)
        if not self._open and not self._done.done():
            self._done.set_result(None)


class _PartSink:
    """Where one part's outputs arrive. Never raises: other requests' outputs come in the same message."""

    __slots__ = ("_generation", "part")

    def __init__(self, generation: Generation, part: Part) -> None:
        self._generation = generation
        self.part = part

    def started(self) -> None:
        self.part.timer.started()

    def put(self, output: StepOutput) -> None:
        generation, part = self._generation, self.part
        try:
            part.timer.observe_step(len(output.token_ids))
            if part.heard is not None:
                part.heard.take(output)
            delta = part.text.step(output)
            finish = delta.finish_reason
            generation._emit(delta)
        except Exception as error:  # noqa: BLE001 - told to this request's client; an unforeseen one is logged there
            generation.fail(as_api_error(error))
            return
        if finish is not None:
            if output.finish_reason is None:  # a stop string: the engine does not know yet
                generation._engine.abort(part.request.request_id)
            generation.end(self, finish)

    def fail(self, error: EngineUnavailable) -> None:
        self._generation.fail(error)
