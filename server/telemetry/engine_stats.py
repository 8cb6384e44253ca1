"""The engine's own counters and gauges, as Prometheus reads them. Counters go on rising when the engine restarts."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable
from itertools import zip_longest

from prometheus_client import Metric
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily

from server.config import CONTROL
from server.engine.messages import EngineStats
from server.telemetry.families import PREFIX

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
    ("step_seconds", "step_s", "Time spent in steps, prefill and verify."),
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

_GAUGES = (
    ("requests_running", "Sequences that hold a slot now."),
    ("requests_background", "Copies of requests, and their scoring, that wait or run while no user's does."),
    ("requests_waiting", "Sequences that wait for a slot now."),
    ("kv_cache_usage_ratio", "Share of the KV blocks in use now, 0 to 1."),
    ("prefix_hit_ratio", "Share of the prompt tokens that the prefix cache served lately, 0 to 1."),
    ("speculation_paused", "1 while the engine does not draft as it would not pay."),
    ("generation_tokens_per_second", "Tokens the engine emitted a second, over the last seconds."),
    ("accepted_length_tokens", "Tokens a sequence gained by a verify step with drafts, bonus token included, lately."),
    ("draft_acceptance_ratio", "Share of the draft tokens that the target accepted lately, 0 to 1."),
    ("speculation_predicted_speedup_ratio", "Speed over plain decoding that the last choice of drafts promised."),
    ("speculation_realised_speedup_ratio", "Speed of the last verify steps over plain decoding, by the cost table."),
)
_LATELY_S = 10.0


class EngineStatsCollector:
    """Keeps each arm's latest stats, and what earlier incarnations of its engine had counted before they died."""

    def __init__(self, clock: Callable[[], float]) -> None:
        self._clock = clock
        self._arms: dict[str, _Arm] = {}

    def update(self, arm: str, stats: EngineStats) -> None:
        if arm not in self._arms:
            self._arms[arm] = _Arm()
        self._arms[arm].update(stats, self._clock())

    def stopped(self, arm: str) -> None:
        """The arm's engine is gone for good: counters stay, gauges say that nothing runs."""
        if arm in self._arms:
            self._arms[arm].restart()

    def take_over(self, arm: str, other: str) -> None:
        """`other`'s engine is `arm`'s from now on: what it has counted stays `other`'s."""
        mine, theirs = self._arms.setdefault(arm, _Arm()), self._arms.setdefault(other, _Arm())
        mine.continue_from(theirs.latest)
        theirs.restart()

    def latest(self, arm: str) -> EngineStats:
        """What that arm's engine said last."""
        return self._arms[arm].latest if arm in self._arms else EngineStats()

    def work(self, arm: str) -> tuple[float, float]:
        """Seconds that the arm's engine spent in steps, and tokens that it emitted, over all restarts."""
        counts = self._arms.get(arm)
        return (0.0, 0.0) if counts is None else (counts.total("step_s"), counts.total("num_emitted"))

    def collect(self) -> Iterable[Metric]:
        arms = self._arms or {CONTROL: _Arm()}
        for name, field, documentation in _COUNTERS:
            counter = CounterMetricFamily(PREFIX + name, documentation, labels=["arm"])
            for arm, counts in arms.items():
                counter.add_metric([arm], counts.total(field))
            yield counter
        yield from self._derived(arms)
        for name, field, documentation in _POSITIONS:
            total = CounterMetricFamily(PREFIX + name, f"{documentation}.", labels=["arm"])
            by_position = CounterMetricFamily(
                f"{PREFIX}{name}_per_position",
                f"{documentation}, by draft position from 1.",
                labels=["arm", "position"],
            )
            for arm, counts in arms.items():
                at = counts.positions(field)
                total.add_metric([arm], sum(at))
                for position, count in enumerate(at, start=1):
                    by_position.add_metric([arm, str(position)], count)
            yield from (total, by_position)
        yield from self._gauges(arms)

    def _derived(self, arms: dict[str, _Arm]) -> Iterable[Metric]:
        queried = CounterMetricFamily(
            PREFIX + "prefix_queried_tokens",
            "Prompt tokens looked up in the prefix cache: those it served and those computed.",
            labels=["arm"],
        )
        drafts = CounterMetricFamily(
            PREFIX + "sequence_drafts", "Drafts, one for a sequence and verify step that had any.", labels=["arm"]
        )
        for arm, counts in arms.items():
            queried.add_metric([arm], counts.total("num_cached_tokens") + counts.total("num_prefill_tokens"))
            drafts.add_metric([arm], sum(counts.positions("drafted_per_position")[:1]))
        yield from (queried, drafts)

    def _gauges(self, arms: dict[str, _Arm]) -> Iterable[Metric]:
        now = self._clock()
        values = {arm: counts.gauges(now) for arm, counts in arms.items()}
        for name, documentation in _GAUGES:
            gauge = GaugeMetricFamily(PREFIX + name, documentation, labels=["arm"])
            for arm, found in values.items():
                value = found[name]
                if value is not None:
                    gauge.add_metric([arm], float(value))
            yield gauge


class _Arm:
    """One arm's engine. `_marks` are (time, stats) of the last seconds, at most one a second, the oldest first."""

    def __init__(self) -> None:
        self.latest = EngineStats()
        self._before: dict[str, float] = {field: 0 for _, field, _ in _COUNTERS}
        self._before_positions: dict[str, list[int]] = {field: [] for _, field, _ in _POSITIONS}
        self._marks: deque[tuple[float, EngineStats]] = deque()

    def update(self, stats: EngineStats, now: float) -> None:
        if stats.num_steps < self.latest.num_steps:
            self.restart()
        if not self._marks or now - self._marks[-1][0] >= 1.0:
            self._marks.append((now, self.latest))  # what was known until now
        self.latest = stats
        self._forget(now)

    def _forget(self, now: float) -> None:
        while len(self._marks) > 1 and self._marks[1][0] <= now - _LATELY_S:
            self._marks.popleft()

    def continue_from(self, stats: EngineStats) -> None:
        """Another engine that has counted this much already."""
        self.restart()
        for field in self._before:
            self._before[field] -= getattr(stats, field)
        for field, before in self._before_positions.items():
            self._before_positions[field] = _added(before, [-count for count in getattr(stats, field)])
        self.latest = stats

    def restart(self) -> None:
        """What is counted from now on is counted from 0."""
        for field in self._before:
            self._before[field] += getattr(self.latest, field)
        for field, before in self._before_positions.items():
            self._before_positions[field] = _added(before, getattr(self.latest, field))
        self.latest = EngineStats()
        self._marks.clear()

    def total(self, field: str) -> float:
        return float(self._before[field] + getattr(self.latest, field))

    def positions(self, field: str) -> list[int]:
        return _added(self._before_positions[field], getattr(self.latest, field))

    def gauges(self, now: float) -> dict[str, float | None]:
        stats = self.latest
        return {
            "requests_running": stats.num_running,
            "requests_waiting": stats.num_waiting,
            "requests_background": stats.num_background,
            "kv_cache_usage_ratio": stats.kv_blocks_used / stats.kv_blocks_total if stats.kv_blocks_total else 0.0,
            "speculation_paused": stats.speculation_paused,
            "speculation_predicted_speedup_ratio": stats.predicted_speedup,
            "speculation_realised_speedup_ratio": stats.realised_speedup,
            **self._lately(now),
        }

    def _lately(self, now: float) -> dict[str, float | None]:
        """Of the last ten seconds or so; ratios of all the time where nothing happened in them."""
        self._forget(now)
        since, then = self._marks[0] if self._marks else (now, self.latest)
        stats = self.latest
        if since <= now - 2 * _LATELY_S:  # nothing was heard of it for long: it idles
            then = stats
        accepted, steps, drafted = _drafts(stats, then)
        cached, computed = _prompts(stats, then)
        return {
            "generation_tokens_per_second": (stats.num_emitted - then.num_emitted) / max(now - since, 1.0),
            "accepted_length_tokens": 1 + accepted / steps if steps else None,
            "draft_acceptance_ratio": accepted / drafted if drafted else None,
            "prefix_hit_ratio": cached / (cached + computed) if cached + computed else None,
        }


def _drafts(stats: EngineStats, then: EngineStats) -> tuple[int, int, int]:
    """Draft tokens accepted, sequences' steps that had any, draft tokens proposed."""
    drafted = sum(stats.drafted_per_position) - sum(then.drafted_per_position)
    if not drafted:
        then, drafted = EngineStats(), sum(stats.drafted_per_position)
    accepted = sum(stats.accepted_per_position) - sum(then.accepted_per_position)
    return accepted, sum(stats.drafted_per_position[:1]) - sum(then.drafted_per_position[:1]), drafted


def _prompts(stats: EngineStats, then: EngineStats) -> tuple[int, int]:
    """Prompt tokens from the prefix cache, and computed."""
    cached, computed = (
        stats.num_cached_tokens - then.num_cached_tokens,
        stats.num_prefill_tokens - then.num_prefill_tokens,
    )
    return (cached, computed) if cached + computed else (stats.num_cached_tokens, stats.num_prefill_tokens)


def _added(a: list[int], b: list[int]) -> list[int]:
    return [x + y for x, y in zip_longest(a, b, fillvalue=0)]
