"""The metrics of requests: names, help and buckets. Every one of them has the label `arm`."""

from __future__ import annotations

from prometheus_client import CollectorRegistry, Counter

from server.telemetry.histogram import HistogramFamily

PREFIX = "outpace_"

_TTFT = (0.001, 0.0025, 0.005, 0.01, 0.02, 0.04, 0.06, 0.08, 0.1, 0.25, 0.5, 0.75, 1.0, 2.5, 5.0, 7.5, 10.0, 30.0, 60.0)
_ITL = (0.0005, 0.001, 0.0025, 0.005, 0.0075, 0.01, 0.015, 0.02, 0.03, 0.04, 0.05, 0.075, 0.1, 0.2, 0.3, 0.5, 1.0, 2.5)
_E2E = (0.05, 0.1, 0.25, 0.5, 0.8, 1.0, 1.5, 2.0, 2.5, 5.0, 10.0, 15.0, 20.0, 30.0, 60.0, 120.0, 240.0, 600.0)
_TOKENS = tuple(step * 10.0**power for power in range(6) for step in (1, 2, 5))

# Short name (of sketches and in /v1/stats): metric, help, buckets.
_LATENCY = {
    "ttft": ("time_to_first_token_seconds", "From a request's arrival to its first token, per choice.", _TTFT),
    "itl": (
        "inter_token_latency_seconds",
        "Time per token after the first: a step that emits n tokens after a gap g counts as n intervals of g/n.",
        _ITL,
    ),
    "step_gap": (
        "step_gap_seconds",
        "Time between two steps that emitted tokens for one choice, however many tokens: the gap between chunks.",
        _ITL,
    ),
    "tpot": (
        "time_per_output_token_seconds",
        "From a choice's first to its last token, divided by the tokens after the first; one value a choice.",
        _ITL,
    ),
    "e2e": (
        "e2e_request_latency_seconds",
        "From a request's arrival to the end of a choice; aborted ones excluded.",
        _E2E,
    ),
    "queue": ("request_queue_time_seconds", "From a request's arrival until a choice holds a slot.", _TTFT),
    "prefill": ("request_prefill_time_seconds", "From the slot to a choice's first token.", _TTFT),
    "decode": ("request_decode_time_seconds", "From a choice's first to its last token.", _E2E),
    "inference": ("request_inference_time_seconds", "From the slot to a choice's last token.", _E2E),
}


class RequestFamilies:
    """All of them, registered in `registry`; `latency` by short name."""

    def __init__(self, registry: CollectorRegistry) -> None:
        self._registry = registry
        self.latency = {short: self._histogram(*metric) for short, metric in _LATENCY.items()}
        self.num_prompt = self._histogram("request_prompt_tokens", "Prompt tokens of a choice that ended.", _TOKENS)
        self.num_generated = self._histogram(
            "request_generation_tokens", "Completion tokens of a choice that ended.", _TOKENS
        )
        self.max_tokens = self._histogram(
            "request_max_tokens", "Most tokens that a choice which ended might have had.", _TOKENS
        )
        self.prompt_tokens = self._counter(
            "prompt_tokens", "Prompt tokens of admitted requests, once per prompt however many choices."
        )
        self.generation_tokens = self._counter(
            "generation_tokens", "Completion tokens as told to clients in `usage`, all choices."
        )
        self.requests = self._counter(
            "requests", "Choices that ended, by finish reason; `abort` is a client that went away.", "finish_reason"
        )

    def _histogram(self, name: str, documentation: str, buckets: tuple[float, ...]) -> HistogramFamily:
        histogram = HistogramFamily(PREFIX + name, documentation, buckets)
        self._registry.register(histogram)
        return histogram

    def _counter(self, name: str, documentation: str, *labels: str) -> Counter:
        return Counter(PREFIX + name, documentation, ["arm", *labels], registry=self._registry)
