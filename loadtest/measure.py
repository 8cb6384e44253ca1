"""From what clients saw to what is reported."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field

import numpy as np

from loadtest.asserts import Objective
from loadtest.generator import Health
from loadtest.record import CANCELLED, OK, Record
from loadtest.samples import Array, Interval, Sample, intervals, sample
from loadtest.scrape import Speculation

METRICS = {
    "ttft": "Time to first token",
    "tpot": "Time per output token",
    "itl": "Inter-token latency",
    "gap": "Gap between chunks",
    "e2el": "End-to-end latency",
    "client_queue_time": "Client-side queueing",
}
"""Distributions in milliseconds by the names of `vllm bench serve`; `gap` is ours."""


@dataclass(frozen=True, slots=True)
class Seen:
    """One run: its records, how the generator fared, what the server counted meanwhile. What was meant to go before
    `begin` is warm-up."""

    records: Sequence[Record]
    health: Sequence[Health] = ()
    begin: float = 0.0
    speculation: Speculation | None = None

    @property
    def measured(self) -> list[Record]:
        """Records behind the warm-up."""
        return [record for record in self.records if record.intended >= self.begin]

    @property
    def end(self) -> float:
        """When the last answer ended."""
        return max((record.ended for record in self.records), default=self.begin)


def token_intervals(record: Record) -> list[float]:
    """Seconds between a record's tokens: a chunk of n tokens after a gap g is n intervals of g / n."""
    found: list[float] = []
    for before, at, count in zip(record.times, record.times[1:], record.tokens[1:], strict=False):
        found += [(at - before) / count] * count
    return found


def gaps(record: Record) -> list[float]:
    """Seconds between a record's chunks."""
    return [b - a for a, b in zip(record.times, record.times[1:], strict=False)]


def tpot(record: Record) -> list[float]:
    """Seconds a token after the first one; nothing for an answer of one token."""
    if record.output_tokens < 2 or not record.times:
        return []
    return [(record.times[-1] - record.times[0]) / (record.output_tokens - 1)]


_VALUES: dict[str, Callable[[Record], list[float]]] = {
    "ttft": lambda record: [record.times[0] - record.intended],
    "tpot": tpot,
    "itl": token_intervals,
    "gap": gaps,
    "e2el": lambda record: [record.times[-1] - record.intended],
}


def values_of(record: Record, metric: str) -> list[float]:
    """Seconds of one of METRICS (`client_queue_time` left out) in a record that has times."""
    return _VALUES[metric](record)


def _sampled(records: Sequence[Record], values: Callable[[Record], list[float]]) -> Sample:
    found = [values(record) for record in records]
    flat = (1e3 * value for one in found for value in one)
    return sample(flat, (number for number, one in enumerate(found) for _ in one))


def is_good(record: Record, objectives: Iterable[Objective]) -> bool:
    """Whether a whole answer kept all objectives; what has no such value (an answer of one token) keeps it."""
    if record.end != OK:
        return False
    return all(1e3 * max(_VALUES[o.metric](record), default=0.0) <= o.limit_ms for o in objectives)


@dataclass(frozen=True)
class Summary:
    """All figures of one run, or of several taken together. Times are seconds, samples milliseconds, rates a second."""

    duration: float
    completed: int
    failed: int
    cancelled: int
    slow: int
    errors: dict[str, int]
    input_tokens: int
    cached_tokens: int
    output_tokens: int
    request_throughput: float
    output_throughput: float
    total_token_throughput: float
    request_goodput: float | None
    max_output_tokens_per_s: float
    max_concurrent_requests: int
    samples: dict[str, Sample]
    intervals: dict[str, dict[str, Interval]]
    speculation: Speculation | None
    warnings: list[str] = field(default_factory=list)

    @property
    def user_speed(self) -> float:
        """Tokens a second that the middle user sees once the answer has begun: the inverse of the median TPOT."""
        middle = self.samples["tpot"].percentile(50)
        return 1e3 / middle if middle > 0 else float("nan")

    def values(self, percentiles: Iterable[float]) -> dict[str, float]:
        """All figures by the names of `vllm bench serve`, for assertions and exports."""
        found: dict[str, float] = {
            "duration": self.duration,
            "completed": self.completed,
            "failed": self.failed,
            "cancelled": self.cancelled,
            "error_rate": self.failed / max(1, self.completed + self.failed),
            "total_input_tokens": self.input_tokens,
            "total_output_tokens": self.output_tokens,
            "request_throughput": self.request_throughput,
            "output_throughput": self.output_throughput,
            "total_token_throughput": self.total_token_throughput,
            "max_output_tokens_per_s": self.max_output_tokens_per_s,
            "max_concurrent_requests": self.max_concurrent_requests,
            "user_speed": self.user_speed,
        }
        if self.request_goodput is not None:
            found["request_goodput"] = self.request_goodput
        for name, of in self.samples.items():
            found |= {f"mean_{name}_ms": of.mean, f"median_{name}_ms": of.percentile(50), f"std_{name}_ms": of.std}
            found |= {f"p{percent:g}_{name}_ms": of.percentile(percent) for percent in percentiles}
        if self.speculation is not None:
            found["spec_decode_acceptance_rate"] = 100 * self.speculation.acceptance_rate
            found["spec_decode_acceptance_length"] = self.speculation.acceptance_length
        return found


SCALARS = (
    *("duration", "completed", "failed", "cancelled", "error_rate", "total_input_tokens", "total_output_tokens"),
    *("request_throughput", "output_throughput", "total_token_throughput", "request_goodput"),
    *("max_output_tokens_per_s", "max_concurrent_requests", "user_speed", "spec_decode_acceptance_rate"),
    "spec_decode_acceptance_length",
    *(f"{kind}_{name}_ms" for name in METRICS for kind in ("mean", "median", "std")),
)
"""Names that an assertion may use beside percentiles."""


def measure(runs: Sequence[Seen], objectives: Sequence[Objective], percentiles: Sequence[float]) -> Summary:
    """The figures of all runs together: samples are pooled, durations summed."""
    records = [record for run in runs for record in run.measured]
    ended_well = [record for record in records if record.end == OK]
    timed = [record for record in ended_well if not record.slow and record.times]
    samples = {name: _sampled(timed, values) for name, values in _VALUES.items()}
    samples["client_queue_time"] = _sampled(records, lambda record: [record.sent - record.intended])
    duration = sum(max(run.end - run.begin, 1e-9) for run in runs)
    inside = sum(count for run in runs for record in run.records for count in _counts_from(record, run.begin))
    # What the streams could not tell apart (chunks of unknown size), usage did: throughput is of the tokens that were
    # made.
    streamed = sum(sum(record.tokens) for run in runs for record in run.records)
    made = sum(record.output_tokens for run in runs for record in run.records)
    output = inside * (made / streamed if streamed else 0.0)
    good = sum(is_good(record, objectives) for record in records)
    input_tokens = sum(record.input_tokens for record in ended_well)
    return Summary(
        duration=duration,
        completed=len(ended_well),
        failed=sum(record.failed for record in records),
        cancelled=sum(record.end == CANCELLED for record in records),
        slow=sum(record.slow for record in records),
        errors=dict(Counter(record.end for record in records if record.failed).most_common()),
        input_tokens=input_tokens,
        cached_tokens=sum(record.cached_tokens for record in ended_well),
        output_tokens=sum(record.output_tokens for record in records),
        request_throughput=len(ended_well) / duration,
        output_throughput=output / duration,
        total_token_throughput=(output + input_tokens) / duration,
        request_goodput=good / duration if objectives else None,
        max_output_tokens_per_s=max((float(max(per_second(run)[1], default=0)) for run in runs), default=0.0),
        max_concurrent_requests=max((peak_concurrency(run.measured) for run in runs), default=0),
        samples=samples,
        intervals={name: intervals(of, percentiles) for name, of in samples.items()},
        speculation=_all_speculation(runs),
    )


def _counts_from(record: Record, begin: float) -> list[int]:
    return [count for at, count in zip(record.times, record.tokens, strict=True) if at >= begin]


def _all_speculation(runs: Sequence[Seen]) -> Speculation | None:
    known = [run.speculation for run in runs if run.speculation is not None]
    total = sum(known, start=Speculation()) if known else None
    return total if total is not None and total.draft_tokens else None


def per_second(run: Seen, width_s: float = 1.0) -> tuple[Array, Array]:
    """Streamed tokens in intervals of `width_s`: when each begins, and tokens a second in it."""
    pairs = [(at, count) for record in run.records for at, count in zip(record.times, record.tokens, strict=True)]
    if not pairs:
        return np.zeros(0), np.zeros(0)
    at, count = np.asarray(pairs, np.float64).T
    sums: Array = np.bincount((at / width_s).astype(np.int64), count).astype(np.float64)
    return np.arange(len(sums), dtype=np.float64) * width_s, sums / width_s


def peak_concurrency(records: Iterable[Record]) -> int:
    """The most requests that were open at once."""
    events = sorted((at, step) for record in records for at, step in ((record.sent, 1), (record.ended, -1)))
    now = most = 0
    for _, step in events:
        now += step
        most = max(most, now)
    return most
