"""What `/metrics` shows. All names start with `outpace_`; counts of tokens never mix drafts with emitted tokens."""

from __future__ import annotations

import platform
import time
from collections.abc import Callable, Iterable

from prometheus_client import CollectorRegistry, Counter, Info, Metric
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily
from prometheus_client.exposition import CONTENT_TYPE_PLAIN_0_0_4, generate_latest

from server.core import FinishReason
from server.engine.messages import EngineInfo, EngineStats
from server.telemetry.engine_stats import EngineStatsCollector
from server.telemetry.histogram import WeightedHistogram

PREFIX = "outpace_"
CONTENT_TYPE = CONTENT_TYPE_PLAIN_0_0_4

_TTFT = (0.001, 0.0025, 0.005, 0.01, 0.02, 0.04, 0.06, 0.08, 0.1, 0.25, 0.5, 0.75, 1.0, 2.5, 5.0, 7.5, 10.0, 30.0, 60.0)
_ITL = (0.0005, 0.001, 0.0025, 0.005, 0.0075, 0.01, 0.015, 0.02, 0.03, 0.04, 0.05, 0.075, 0.1, 0.2, 0.3, 0.5, 1.0, 2.5)
_E2E = (0.05, 0.1, 0.25, 0.5, 0.8, 1.0, 1.5, 2.0, 2.5, 5.0, 10.0, 15.0, 20.0, 30.0, 60.0, 120.0, 240.0, 600.0)

Clock = Callable[[], float]


class Metrics:
    """One process's metrics: `registry` has what HTTP requests did here, `engine_registry` what there is once a server.

    Written to and scraped on the event loop.
    """

    def __init__(self, version: str, clock: Clock = time.perf_counter) -> None:
        self.clock = clock
        self.registry = CollectorRegistry()
        self.engine_registry = CollectorRegistry()
        self.time_to_first_token = self._histogram(
            "time_to_first_token_seconds", "From a request's arrival to its first token, per choice.", _TTFT
        )
        self.inter_token_latency = self._histogram(
            "inter_token_latency_seconds",
            "Time per token after the first: a step that emits n tokens after a gap g counts as n intervals of g/n.",
            _ITL,
        )
        self.step_gap = self._histogram(
            "step_gap_seconds", "Time between two steps that emitted tokens for one choice, however many tokens.", _ITL
        )
        self.e2e_latency = self._histogram(
            "e2e_request_latency_seconds",
            "From a request's arrival to the end of a choice; aborted ones excluded.",
            _E2E,
        )
        self.prompt_tokens = self._counter(
            "prompt_tokens", "Prompt tokens of admitted requests, once per prompt however many choices."
        )
        self.generation_tokens = self._counter(
            "generation_tokens", "Completion tokens as told to clients in `usage`, all choices."
        )
        self.requests = self._counter(
            "requests", "Choices that ended, by finish reason; `abort` is a client that went away.", ["finish_reason"]
        )
        self.http_requests = self._counter("http_requests", "HTTP requests answered.", ["route", "status"])
        self.slow_clients_dropped = self._counter(
            "slow_clients_dropped", "Streams that were cut since their client took nothing for too long."
        )
        self._answers: dict[tuple[str, int], Counter] = {}
        self.requests_by_reason = {reason: self.requests.labels(reason.value) for reason in FinishReason}
        self._build = Info(PREFIX + "build", "What runs here.", registry=self.engine_registry)
        self._build_labels = {"version": version, "python": platform.python_version()}
        self._build.info(self._build_labels)
        self.engine_stats = EngineStatsCollector(PREFIX)
        self.engine_registry.register(self.engine_stats)

    def _histogram(self, name: str, documentation: str, buckets: tuple[float, ...]) -> WeightedHistogram:
        histogram = WeightedHistogram(PREFIX + name, documentation, buckets)
        self.registry.register(histogram)
        return histogram

    def _counter(self, name: str, documentation: str, labels: Iterable[str] = ()) -> Counter:
        return Counter(PREFIX + name, documentation, list(labels), registry=self.registry)

    def watch_engine(self, ready: Callable[[], bool], num_restarts: Callable[[], int]) -> None:
        """Asks the engine's client on every scrape."""
        self.engine_registry.register(_EngineState(ready, num_restarts))

    def on_stats(self, stats: EngineStats) -> None:
        """What the engine counted since it started."""
        self.engine_stats.update(stats)

    def on_ready(self, info: EngineInfo) -> None:
        """The build info gains what the engine says of itself."""
        self._build.info(
            self._build_labels
            | {
                "model": info.model,
                "architecture": info.architecture,
                "dtype": info.dtype,
                "device": info.device,
                "drafter": info.drafter,
                "verification": info.verification,
            }
        )

    def count_answer(self, route: str, status: int) -> None:
        """One answer of `status` on `route`, a pattern."""
        key = route, status
        counter = self._answers.get(key)
        if counter is None:  # looking a label pair up costs more than counting
            counter = self._answers[key] = self.http_requests.labels(route, str(status))
        counter.inc()

    def choice_timer(self, arrival: float) -> ChoiceTimer:
        return ChoiceTimer(self, arrival)

    def render(self) -> bytes:
        """Prometheus' text format 0.0.4."""
        return generate_latest(self.registry) + generate_latest(self.engine_registry)

    def render_engine(self) -> bytes:
        """What there is once a server only."""
        return generate_latest(self.engine_registry)


class ChoiceTimer:
    """Times one choice. `arrival` is on the metrics' clock, in seconds. `ttft_s` and `reason` once they are known."""

    def __init__(self, metrics: Metrics, arrival: float) -> None:
        self._metrics = metrics
        self._arrival = arrival
        self._last: float | None = None
        self.ttft_s: float | None = None
        self.reason: FinishReason | None = None

    def observe_step(self, num_tokens: int) -> None:
        """A step emitted this many tokens just now. Tokens that come together with the first have no interval."""
        if num_tokens == 0:
            return
        now = self._metrics.clock()
        if self._last is None:
            self.ttft_s = now - self._arrival
            self._metrics.time_to_first_token.observe(self.ttft_s)
        else:
            gap = now - self._last
            self._metrics.step_gap.observe(gap)
            self._metrics.inter_token_latency.observe(gap / num_tokens, num_tokens)
        self._last = now

    def finish(self, reason: FinishReason, num_completion_tokens: int) -> None:
        """The choice has ended."""
        self.reason = reason
        self._metrics.requests_by_reason[reason].inc()
        self._metrics.generation_tokens.inc(num_completion_tokens)
        if reason in (FinishReason.STOP, FinishReason.LENGTH):
            self._metrics.e2e_latency.observe(self._metrics.clock() - self._arrival)


class _EngineState:
    def __init__(self, ready: Callable[[], bool], num_restarts: Callable[[], int]) -> None:
        self._ready = ready
        self._num_restarts = num_restarts

    def collect(self) -> Iterable[Metric]:
        yield GaugeMetricFamily(PREFIX + "engine_ready", "1 while the engine serves.", value=float(self._ready()))
        yield CounterMetricFamily(
            PREFIX + "engine_restarts", "Times the engine process was started again.", value=self._num_restarts()
        )
