"""Two targets, or one with and without speculation, measured in turn: ratios with intervals."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from statistics import fmean, stdev

import numpy as np

from loadtest.measure import METRICS, Seen, Summary, values_of
from loadtest.record import OK
from loadtest.samples import CONFIDENCE, Array, Interval
from loadtest.settings import Settings

_RESAMPLES, _AT_ONCE = 1000, 20
_RATES = {"output_throughput": "output tokens/s", "request_throughput": "requests/s"}
_LATENCIES = ("ttft", "tpot", "e2el")
"""Those with one value a request, so that requests can be paired."""
# Two-sided 95 % quantiles of Student's t for 1, 2, ... degrees of freedom; beyond, the normal one is near enough.
_T = (12.71, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262, 2.228, 2.201, 2.179, 2.160, 2.145, 2.131)


@dataclass(frozen=True, slots=True)
class Ratio:
    """B's figure over A's. `interval` None: not enough runs to say."""

    name: str
    a: float
    b: float
    ratio: float
    interval: Interval | None

    def __str__(self) -> str:
        told = "" if self.interval is None else f"  ({self.interval.low:.3f} - {self.interval.high:.3f})"
        return f"{self.name}: {self.a:.4g} -> {self.b:.4g}, x {self.ratio:.3f}{told}"


def twin(settings: Settings) -> tuple[Settings, Settings]:
    """The same test without and with speculation, by Outpace's field of each request."""
    off, on = (
        replace(settings, asked=replace(settings.asked, fields={**settings.asked.fields, "speculative": own}))
        for own in ({"enabled": False}, {"enabled": True})
    )
    return off, on


def turns(repeats: int) -> list[tuple[int, int]]:
    """(side, repeat) in the order of running: A B, B A, A B …, so that a slow drift meets both alike."""
    return [(side, n) for n in range(repeats) for side in ((0, 1) if n % 2 == 0 else (1, 0))]


def ratios(a: Sequence[Seen], b: Sequence[Seen], runs_a: Sequence[Summary], runs_b: Sequence[Summary]) -> list[Ratio]:
    """Rates from pairs of runs, latencies from pairs of requests: run n of both sides asked for the same."""
    found = [
        _of_runs(label, [getattr(run, name) for run in runs_a], [getattr(run, name) for run in runs_b])
        for name, label in _RATES.items()
    ]
    for metric in _LATENCIES:
        ours, theirs = _by_request(a, metric), _by_request(b, metric)
        keys = sorted(ours.keys() & theirs.keys())
        if not keys:
            continue
        first, second = (np.asarray([side[key] for key in keys]) for side in (ours, theirs))
        found.append(_of_requests(f"mean {METRICS[metric]}, ms", first, second, _mean))
        found.append(_of_requests(f"p95 {METRICS[metric]}, ms", first, second, _p95))
    return found


def _of_runs(name: str, a: Sequence[float], b: Sequence[float]) -> Ratio:
    """Geometric mean of the pairs' ratios, with Student's interval of their logarithms."""
    logs = [math.log(y / x) for x, y in zip(a, b, strict=True) if x > 0 and y > 0]
    middle = fmean(logs) if logs else float("nan")
    interval = None
    if len(logs) > 1:
        half = (_T[len(logs) - 2] if len(logs) - 2 < len(_T) else 1.96) * stdev(logs) / math.sqrt(len(logs))
        interval = Interval(math.exp(middle - half), math.exp(middle + half))
    return Ratio(name, fmean(a), fmean(b), math.exp(middle), interval)


def _by_request(runs: Sequence[Seen], metric: str) -> dict[tuple[int, int, int], float]:
    """Milliseconds of each request by (run, session, turn)."""
    return {
        (number, record.session, record.turn): 1e3 * value
        for number, run in enumerate(runs)
        for record in run.measured
        if record.end == OK and not record.slow and record.times
        for value in values_of(record, metric)
    }


def _mean(values: Array) -> Array:
    return np.asarray(values.mean(axis=-1))


def _p95(values: Array) -> Array:
    return np.asarray(np.percentile(values, 95, axis=-1))


def _of_requests(name: str, a: Array, b: Array, figure: Callable[[Array], Array]) -> Ratio:
    """Paired bootstrap: pairs of equal requests are drawn (Davison and Hinkley 1997, section 2.4)."""
    first, second = float(figure(a)), float(figure(b))
    if len(a) < 2 or first <= 0:
        return Ratio(name, first, second, second / first if first > 0 else float("nan"), None)
    random = np.random.default_rng(0)
    drawn = []
    for _ in range(_RESAMPLES // _AT_ONCE):
        picked = random.integers(0, len(a), (_AT_ONCE, len(a)))
        drawn.append(figure(b[picked]) / figure(a[picked]))
    tail = (1 - CONFIDENCE) / 2 * 100
    low, high = np.percentile(np.concatenate(drawn), (tail, 100 - tail))
    return Ratio(name, first, second, second / first, Interval(float(low), float(high)))
