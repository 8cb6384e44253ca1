"""What one arm's requests took: histograms, windowed sketches and counters, and the timer that feeds them.

A token costs an append; values are counted by the hundred, before a window's slot ends or somebody looks.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator

import numpy as np
from numpy.typing import NDArray

from server.core import FinishReason
from server.telemetry.families import RequestFamilies
from server.telemetry.histogram import WeightedHistogram
from server.telemetry.windows import SLOT_S, Slot, WindowedSketch

_MOST = 512
Array = NDArray[np.float64]


class Buffer:
    """Values of one metric, each with how often it occurred. `take(at, values, counts)` gets those of one slot."""

    __slots__ = ("_at", "_counts", "_take", "_until", "_values")

    def __init__(self, take: Callable[[float, Array, Array], None]) -> None:
        self._take = take
        self._values: list[float] = []
        self._counts: list[int] = []
        self._at = 0.0
        self._until = 0.0

    def add(self, value: float, now: float, count: int = 1) -> None:
        if now >= self._until or len(self._values) >= _MOST:
            self.flush()
            self._at, self._until = now, (now // SLOT_S + 1) * SLOT_S
        self._values.append(value)
        self._counts.append(count)

    def flush(self) -> None:
        """Hands on what there is."""
        if self._values:
            self._take(self._at, np.array(self._values), np.array(self._counts, dtype=np.float64))
            self._values.clear()
            self._counts.clear()


class ArmMetrics:
    """One arm's series. Times are seconds of `clock`."""

    def __init__(self, arm: str, families: RequestFamilies, clock: Callable[[], float]) -> None:
        self.arm = arm
        self.clock = clock
        self._sketches: dict[str, WindowedSketch] = {}
        self._buffers: list[Buffer] = []
        histograms = families.latency
        self.ttft = self._single(histograms["ttft"].labels(arm), "ttft")
        self.tpot = self._single(histograms["tpot"].labels(arm), "tpot")
        self.e2e = self._single(histograms["e2e"].labels(arm), "e2e")
        self.queue = self._single(histograms["queue"].labels(arm), "queue")
        self.prefill = self._single(histograms["prefill"].labels(arm))
        self.decode = self._single(histograms["decode"].labels(arm))
        self.inference = self._single(histograms["inference"].labels(arm))
        self.gaps = self._gaps(histograms["itl"].labels(arm), histograms["step_gap"].labels(arm))
        self.max_tokens = families.max_tokens.labels(arm)
        self.num_prompt = families.num_prompt.labels(arm)
        self.num_generated = families.num_generated.labels(arm)
        self.prompt_tokens = families.prompt_tokens.labels(arm)
        self.generation_tokens = families.generation_tokens.labels(arm)
        self.requests = {reason: families.requests.labels(arm, reason.value) for reason in FinishReason}

    def _single(self, histogram: WeightedHistogram, sketch: str | None = None) -> Buffer:
        windows = None if sketch is None else self._sketch(sketch)

        def take(at: float, values: Array, counts: Array) -> None:
            histogram.observe_all(values)
            if windows is not None:
                windows.add(at, values)

        return self._buffer(take)

    def _gaps(self, itl: WeightedHistogram, step_gap: WeightedHistogram) -> Buffer:
        """Takes the gap before a step, and how many tokens that step emitted."""
        itl_windows, gap_windows = self._sketch("itl"), self._sketch("step_gap")

        def take(at: float, gaps: Array, num_tokens: Array) -> None:
            intervals = gaps / num_tokens
            itl.observe_all(intervals, num_tokens)
            itl_windows.add(at, intervals, num_tokens)
            step_gap.observe_all(gaps)
            gap_windows.add(at, gaps)

        return self._buffer(take)

    def _sketch(self, name: str) -> WindowedSketch:
        sketch = self._sketches[name] = WindowedSketch()
        return sketch

    def _buffer(self, take: Callable[[float, Array, Array], None]) -> Buffer:
        buffer = Buffer(take)
        self._buffers.append(buffer)
        return buffer

    def admitted(self, num_prompt_tokens: int) -> None:
        """A prompt of a request that was let in, once however many choices it has."""
        self.prompt_tokens.inc(num_prompt_tokens)

    def choice_timer(self, arrival: float, num_prompt_tokens: int = 0, max_tokens: int = 0) -> ChoiceTimer:
        """For one choice of a request that arrived at `arrival`."""
        return ChoiceTimer(self, arrival, num_prompt_tokens, max_tokens)

    def flush(self) -> None:
        """Whoever looks at the histograms sees everything that was measured."""
        for buffer in self._buffers:
            buffer.flush()

    def slots(self, now: float) -> Iterator[Slot]:
        """What windows are made of; after `flush`."""
        for metric, sketch in self._sketches.items():
            yield from sketch.slots(self.arm, metric, now)


class ChoiceTimer:
    """Times one choice. `ttft_s`, `queue_s` and `reason` once they are known; `decode_s` is from first to last token.

    `arrival ── started ── first token ──…── last token ── finish`
    """

    __slots__ = (
        "_arm", "_arrival", "_first", "_last", "_max_tokens", "_num_prompt", "_num_tokens", "_started", "e2e_s", "gaps",
        "queue_s", "reason", "ttft_s",
    )  # fmt: skip

    def __init__(self, arm: ArmMetrics, arrival: float, num_prompt_tokens: int, max_tokens: int) -> None:
        self._arm = arm
        self._arrival = arrival
        self._num_prompt = num_prompt_tokens
        self._max_tokens = max_tokens
        self._started: float | None = None
        self._first = self._last = 0.0
        self._num_tokens = 0
        self.queue_s: float | None = None
        self.ttft_s: float | None = None
        self.e2e_s: float | None = None
        self.gaps: list[tuple[float, int]] | None = None
        """Seconds before each step after the first and the tokens that it emitted; a list where somebody wants them."""
        self.reason: FinishReason | None = None

    @property
    def prefill_s(self) -> float | None:
        """From the slot to the first token."""
        return None if self.ttft_s is None or self.queue_s is None else self.ttft_s - self.queue_s

    @property
    def decode_s(self) -> float:
        return self._last - self._first

    @property
    def num_tokens(self) -> int:
        """Tokens that steps emitted, those that a stop string cut off included."""
        return self._num_tokens

    def started(self) -> None:
        """The choice holds a slot from now on."""
        if self._started is None:
            self._started = self._arm.clock()
            self.queue_s = self._started - self._arrival

    def observe_step(self, num_tokens: int) -> None:
        """A step emitted this many tokens just now. Tokens that come together with the first have no interval."""
        if num_tokens == 0:
            return
        arm = self._arm
        now = arm.clock()
        if self.ttft_s is None:
            self._observe_first(now)
        else:
            arm.gaps.add(now - self._last, now, num_tokens)
            if self.gaps is not None:
                self.gaps.append((now - self._last, num_tokens))
        self._num_tokens += num_tokens
        self._last = now

    def _observe_first(self, now: float) -> None:
        arm = self._arm
        if self._started is None:  # an engine that does not say
            self._started = now
            self.queue_s = now - self._arrival
        self._first = now
        self.ttft_s = now - self._arrival
        arm.ttft.add(self.ttft_s, now)
        arm.queue.add(self._started - self._arrival, now)
        arm.prefill.add(now - self._started, now)

    def finish(self, reason: FinishReason, num_completion_tokens: int) -> None:
        """The choice has ended."""
        arm = self._arm
        self.reason = reason
        now = arm.clock()
        self.e2e_s = now - self._arrival
        arm.requests[reason].inc()
        arm.generation_tokens.inc(num_completion_tokens)
        if reason not in (FinishReason.STOP, FinishReason.LENGTH):
            return
        arm.e2e.add(self.e2e_s, now)
        arm.max_tokens.observe(self._max_tokens)
        arm.num_prompt.observe(self._num_prompt)
        arm.num_generated.observe(num_completion_tokens)
        if self.ttft_s is None or self._started is None:
            return
        decode_s = self._last - self._first
        arm.decode.add(decode_s, now)
        arm.inference.add(self._last - self._started, now)
        if self._num_tokens > 1:
            arm.tpot.add(decode_s / (self._num_tokens - 1), now)
