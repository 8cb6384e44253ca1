"""Comparisons of answers with their copies as Prometheus sees them, from the process that holds the book."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import Final

from prometheus_client import Metric
from prometheus_client.core import CounterMetricFamily, HistogramMetricFamily

from server.routing.replay.book import Book, Histogram, Pair, Tally
from server.routing.replay.comparison import DROP_REASONS, VERDICTS
from server.routing.replay.sampling import KINDS, SHADOW
from server.telemetry.families import PREFIX

_COUNTERS: Final[Mapping[str, tuple[str, Callable[[Tally], float]]]] = {
    "compared": ("Copies whose answer was compared with the request's.", lambda tally: tally.num_compared),
    "diverged": ("Comparisons that found another token.", lambda tally: tally.num_diverged),
    "alarms": ("Divergences that must not be: neither rounding nor another model.", lambda tally: tally.num_alarms),
}
_HISTOGRAMS = {
    "position": ("first_divergence_tokens", "Tokens that the two answers share, where they differ."),
    "length_shift": ("length_shift_tokens", "Tokens of the copy's answer less those of the request's."),
    "tpot_ratio": (
        "time_per_output_token_ratio",
        "The copy's time per token over the request's; the copy's includes what it waited for users.",
    ),
}


class ReplayMetrics:
    """A collector of what `book` holds. Labels: `arm` answers the copies; of shadows `of` answers the requests."""

    def __init__(self, book: Book) -> None:
        self._book = book

    def collect(self) -> Iterable[Metric]:
        """Nothing of a kind that is not configured."""
        for kind in KINDS:
            tallies = {pair: tally for pair, tally in self._book.tallies.items() if pair[0] == kind}
            if tallies:
                yield from _counters(kind, tallies)
                yield from _histograms(kind, tallies)


def _counters(kind: str, tallies: dict[Pair, Tally]) -> Iterable[Metric]:
    for name, (documentation, value) in _COUNTERS.items():
        family = CounterMetricFamily(f"{PREFIX}{kind}_{name}", documentation, labels=_labels(kind))
        for pair, tally in tallies.items():
            family.add_metric(_values(pair), value(tally))
        yield family
    verdicts = CounterMetricFamily(
        f"{PREFIX}{kind}_verdicts", "Comparisons by what they said.", labels=[*_labels(kind), "verdict"]
    )
    dropped = CounterMetricFamily(
        f"{PREFIX}{kind}_dropped",
        "Copies that there was no room for, or that did not come to their end.",
        labels=[*_labels(kind), "reason"],
    )
    for pair, tally in tallies.items():
        for verdict in VERDICTS:
            verdicts.add_metric([*_values(pair), verdict], tally.verdicts[verdict])
        for reason in DROP_REASONS:
            dropped.add_metric([*_values(pair), reason], tally.dropped[reason])
    yield from (verdicts, dropped)


def _histograms(kind: str, tallies: dict[Pair, Tally]) -> Iterable[Metric]:
    for name, (suffix, documentation) in _HISTOGRAMS.items():
        family = HistogramMetricFamily(f"{PREFIX}{kind}_{suffix}", documentation, labels=_labels(kind))
        for pair, tally in tallies.items():
            histogram = tally.histograms[name]
            falls = any(bound < 0 for bound in histogram.bounds)  # a sum that can fall is no counter
            family.add_metric(_values(pair), _cumulated(histogram), None if falls else histogram.total)
        yield family


def _cumulated(histogram: Histogram) -> list[tuple[str, float]]:
    total, buckets = 0, []
    for bound, num in zip([*map(float, histogram.bounds), float("inf")], histogram.counts, strict=True):
        total += num
        buckets.append(("+Inf" if bound == float("inf") else str(bound), float(total)))
    return buckets


def _labels(kind: str) -> list[str]:
    return ["of", "arm"] if kind == SHADOW else ["arm"]


def _values(pair: Pair) -> list[str]:
    kind, of, arm = pair
    return [of, arm] if kind == SHADOW else [arm]
