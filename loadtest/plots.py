"""The plots of a report: distributions, the run over time, acceptance, and load against latency."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from loadtest.measure import METRICS, Seen, Summary, per_second
from loadtest.samples import Sample
from loadtest.svg import Axis, Series, plot

_QUANTILES = np.unique(np.concatenate((np.linspace(0, 99, 199), np.linspace(99, 100, 51))))
_MOST_DOTS = 3000
_REQUEST = ("ttft", "e2el")
_TOKEN = ("tpot", "itl", "gap")


def distributions(summaries: dict[str, Summary]) -> list[str]:
    """Cumulative shares of requests by latency, of tokens by interval; a name for each summary where there are
    several."""
    found = []
    for metrics, what in ((_REQUEST, "Latency of requests"), (_TOKEN, "Between tokens")):
        series = [
            Series(" ".join(filter(None, (name, metric))), *_cdf(summary.samples[metric]))
            for name, summary in summaries.items()
            for metric in metrics
            if len(summary.samples[metric])
        ]
        found.append(plot(what, series, Axis("milliseconds", logarithmic=True), Axis("share", least=0.0, most=1.0)))
    return found


def _cdf(of: Sample) -> tuple[list[float], list[float]]:
    values = np.maximum(np.percentile(of.values, _QUANTILES), 1e-3)
    return [float(v) for v in values], [float(q) / 100 for q in _QUANTILES]


def over_time(run: Seen) -> list[str]:
    """Tokens a second, requests open, and each request's wait for the first token by when it was meant to be sent."""
    at, rates = per_second(run)
    seconds = Axis("seconds since the start", least=0.0)
    records = [record for record in run.records if record.times and not record.slow]
    records = records[:: max(1, len(records) // _MOST_DOTS)]
    waits = [1e3 * (record.times[0] - record.intended) for record in records]
    opened = _open_requests(run)
    failed = [record.intended for record in run.records if record.failed]
    dots = [Series("time to first token", [record.intended for record in records], waits, "dots")]
    if failed:
        dots.append(Series("failed", failed, [0.0] * len(failed), "dots"))
    return [
        plot("Output tokens a second", [Series("", list(at), list(rates))], seconds, Axis("tokens/s", least=0.0)),
        plot("Open requests", [Series("", *opened)], seconds, Axis("requests", least=0.0)),
        plot("Time to first token over time", dots, seconds, Axis("milliseconds", least=0.0)),
    ]


def _open_requests(run: Seen) -> tuple[list[float], list[float]]:
    """How many requests were open, at a few hundred moments."""
    if not run.records:
        return [], []
    sent = np.sort([record.sent for record in run.records])
    ended = np.sort([record.ended for record in run.records])
    moments = np.linspace(0, run.end, 300)
    counts = np.searchsorted(sent, moments, side="right") - np.searchsorted(ended, moments, side="right")
    return [float(m) for m in moments], [float(c) for c in counts]


def acceptance(summaries: dict[str, Summary]) -> list[str]:
    """By position of the draft, the share of drafts in which the token was accepted."""
    series = []
    for name, summary in summaries.items():
        rates = summary.speculation.per_position if summary.speculation is not None else []
        while rates and not rates[-1]:
            rates = rates[:-1]
        if rates:
            kind = "bars" if len(summaries) == 1 else "both"
            series.append(Series(name, list(range(1, len(rates) + 1)), rates, kind))
    longest = max((len(one.xs) for one in series), default=0)
    positions = Axis("position in the draft", least=0.0, most=longest + 1.0)
    return [plot("Accepted draft tokens by position", series, positions, Axis("share", least=0.0, most=1.0))]


def against_load(points: Sequence[tuple[float, Summary]], unit: str) -> list[str]:
    """Latency and throughput of several runs by their load, and throughput against the speed that one user sees."""
    if len(points) < 2:
        return []
    points = sorted(points, key=lambda point: point[0])
    loads = [load for load, _ in points]
    found = []
    for metric in ("ttft", "tpot", "e2el"):
        series = [
            Series(f"p{p:g}", loads, [s.samples[metric].percentile(p) for _, s in points], "both")
            for p in (50.0, 95.0, 99.0)
        ]
        found.append(plot(f"{METRICS[metric]} against load", series, Axis(unit), Axis("milliseconds", least=0.0)))
    rates = [s.output_throughput for _, s in points]
    found.append(
        plot("Throughput against load", [Series("", loads, rates, "both")], Axis(unit), Axis("tokens/s", least=0.0))
    )
    users = [s.user_speed for _, s in points]
    order = np.argsort(users)
    pareto = Series("", [users[i] for i in order], [rates[i] for i in order], "both")
    speed = Axis("tokens/s that a user sees (median)", least=0.0)
    found.append(plot("Throughput against user speed", [pareto], speed, Axis("tokens/s in all", least=0.0)))
    return found
