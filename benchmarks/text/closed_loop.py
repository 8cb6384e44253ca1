"""Streams that each send their next request when the last is answered: the engine's load in these benchmarks."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass, field

from server.core import Request
from server.engine.core import EngineCore


@dataclass
class Answer:
    """One request's tokens; `verdicts` are (drafted, accepted) of its verify steps. Times are since the loop began.

    A request's first token is its prompt's: no verify step emitted it.
    """

    tokens: list[int] = field(default_factory=list)
    verdicts: list[tuple[int, int]] = field(default_factory=list)
    first_s: float = 0.0
    last_s: float = 0.0


@dataclass(frozen=True)
class Window:
    """What came out while the clock ran. `num_answers` are whole ones."""

    num_tokens: int
    num_answers: int
    seconds: float

    @property
    def tok_s(self) -> float:
        return self.num_tokens / self.seconds


NextRequest = Callable[[], Request | None]
OnAnswer = Callable[[Request, Answer], None]


def closed_loop(
    core: EngineCore, next_request: NextRequest, num_streams: int, on_answer: OnAnswer | None = None, *, drain: bool
) -> Window:
    """Keeps `num_streams` requests under way for as long as there are any.

    `drain`: until all are answered (`next_request` may have more after an answer). Otherwise only for as long as all
    streams are busy; what they have said by then is counted, and the rest is dropped. Raises RuntimeError for a request
    that fails, and if one was preempted: what is computed twice would be counted twice.
    """
    loop = _Loop(core, next_request, on_answer)
    preemptions = core.stats().num_preemptions
    while loop.fill(num_streams) or (drain and loop.running):
        loop.step()
    for name in loop.running:
        core.abort(name)
    while core.has_work:
        core.step()
    core.check_integrity()
    if core.stats().num_preemptions > preemptions:
        raise RuntimeError("a request was preempted: the KV cache is too small for this load")
    return Window(loop.num_tokens, loop.num_answers, loop.seconds)


class _Loop:
    def __init__(self, core: EngineCore, next_request: NextRequest, on_answer: OnAnswer | None) -> None:
        self.core, self.next_request, self.on_answer = core, next_request, on_answer
        self.running: dict[str, tuple[Request, Answer]] = {}
        self.num_tokens = self.num_answers = 0
        self.seconds = 0.0
        self._started = time.perf_counter()

    def fill(self, num_streams: int) -> bool:
        """Whether all streams are busy now."""
        while len(self.running) < num_streams:
            request = self.next_request()
            if request is None:
                return False
            refused = self.core.submit(request)
            if refused is not None:
                raise RuntimeError(refused.error)
            self.running[request.request_id] = (request, Answer())
        return True

    def step(self) -> None:
        outputs = self.core.step()
        now = time.perf_counter() - self._started
        for output in outputs:
            if output.error:
                raise RuntimeError(output.error)
            request, answer = self.running[output.request_id]
            if answer.tokens:
                answer.verdicts.append((output.num_drafted, output.num_accepted))
            else:
                answer.first_s = now
            answer.tokens += output.token_ids
            answer.last_s = self.seconds = now
            self.num_tokens += len(output.token_ids)
            if output.finish_reason is not None:
                del self.running[output.request_id]
                self.num_answers += 1
                if self.on_answer is not None:
                    self.on_answer(request, answer)
