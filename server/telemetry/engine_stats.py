"""The engine's own counters and gauges, as Prometheus reads them. Counters go on rising when the engine restarts."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from itertools import zip_longest

from prometheus_client import Metric
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily

from server.engine.messages import EngineStats

# Metric name without prefix and `_total`, field of EngineStats, help.
_COUNTERS = (
    ("engine_steps", "num_steps", "Engine steps, prefill and verify."),
    ("engine_draft_steps", "num_draft_steps", "Verify steps that had at least one draft token."),
    ("prefill_tokens", "num_prefill_tokens", "Prompt tokens computed by the target, recomputation included."),
    ("prefix_cached_tokens", "num_cached_tokens", "Prompt tokens served by the prefix cache instead of computed."),
    ("emitted_tokens", "num_emitted", "Tokens the engine emitted: accepted drafts and bonus tokens."),
    ("engine_graph_misses", "num_graph_misses", "Halves of GPU steps that ran eagerly for want of a CUDA graph."),
    ("preemptions", "num_preemptions", "Sequences preempted to free KV blocks, to be recomputed later."),
    ("speculation_pauses", "num_speculation_pauses", "Times the engine stopped drafting as it would not pay."),
    ("verify_seconds", "verify_s", "Time of verify steps, drafting included."),
    (
        "verify_plain_seconds",
        "verify_plain_s",
        "Time that the tokens of those steps would have taken without drafts, by the cost table.",
    ),
)
_POSITIONS = (
    ("draft_tokens", "drafted_per_position", "Draft tokens proposed to the target"),
    ("accepted_draft_tokens", "accepted_per_position", "Draft tokens the target accepted (never the bonus token)"),
)


class EngineStatsCollector:
    """Keeps the latest stats, and what earlier incarnations of the engine had counted before they died."""

    def __init__(self, prefix: str) -> None:
        self._prefix = prefix
        self._latest = EngineStats()
        self._before: dict[str, float] = {field: 0 for _, field, _ in _COUNTERS}
        self._before_positions: dict[str, list[int]] = {field: [] for _, field, _ in _POSITIONS}

    def update(self, stats: EngineStats) -> None:
        if stats.num_steps < self._latest.num_steps:
            self._restart()
        self._latest = stats

    def _restart(self) -> None:
        for field in self._before:
            self._before[field] += getattr(self._latest, field)
        for field, before in self._before_positions.items():
            self._before_positions[field] = _added(before, getattr(self._latest, field))

    def collect(self) -> Iterable[Metric]:
        for name, field, documentation in _COUNTERS:
            value = self._before[field] + getattr(self._latest, field)
            yield CounterMetricFamily(self._prefix + name, documentation, value=value)
        for name, field, documentation in _POSITIONS:
            yield from self._positions(
                name, _added(self._before_positions[field], getattr(self._latest, field)), documentation
            )
        yield from self._gauges()

    def _positions(self, name: str, counts: list[int], documentation: str) -> Iterator[Metric]:
        yield CounterMetricFamily(self._prefix + name, f"{documentation}.", value=sum(counts))
        by_position = CounterMetricFamily(
            f"{self._prefix}{name}_per_position", f"{documentation}, by draft position from 1.", labels=["position"]
        )
        for position, count in enumerate(counts, start=1):
            by_position.add_metric([str(position)], count)
        yield by_position

    def _gauges(self) -> Iterator[Metric]:
        stats = self._latest
        usage = stats.kv_blocks_used / stats.kv_blocks_total if stats.kv_blocks_total else 0.0
        for name, value, documentation in (
            ("requests_running", stats.num_running, "Sequences that hold a slot now."),
            ("requests_waiting", stats.num_waiting, "Sequences that wait for a slot now."),
            ("kv_cache_usage_ratio", usage, "Share of the KV blocks in use now, 0 to 1."),
            (
                "speculation_paused",
                stats.speculation_paused,
                "1 while the engine does not draft as it would not pay.",
            ),
        ):
            yield GaugeMetricFamily(self._prefix + name, documentation, value=float(value))
        for name, speedup, documentation in (
            (
                "predicted",
                stats.predicted_speedup,
                "Speed over plain decoding that the last choice of drafts promised.",
            ),
            (
                "realised",
                stats.realised_speedup,
                "Speed of the last verify steps over plain decoding, by the cost table.",
            ),
        ):
            if speedup is not None:
                yield GaugeMetricFamily(f"{self._prefix}speculation_{name}_speedup_ratio", documentation, value=speedup)


def _added(a: list[int], b: list[int]) -> list[int]:
    return [x + y for x, y in zip_longest(a, b, fillvalue=0)]
