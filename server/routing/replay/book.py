"""What comparisons have shown so far: counts of each pair of arms, and the last divergences with their evidence."""

from __future__ import annotations

from bisect import bisect_left
from collections import deque
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, field
from typing import Any, Final

from server.routing.replay.comparison import ALARM, DROP_REASONS, SAME, VERDICTS, Comparison, Dropped

NUM_KEPT = 100
"""Divergences that are remembered."""

Pair = tuple[str, str, str]
"""(kind, arm whose requests are copied, arm that answers the copies)."""

BUCKETS: Final[Mapping[str, tuple[float, ...]]] = {
    "position": (0, 1, 2, 4, 8, 16, 32, 64, 128, 256, 512, 1024, 4096),
    "length_shift": (-256, -64, -16, -4, -1, 0, 1, 4, 16, 64, 256),
    "tpot_ratio": (0.25, 0.5, 0.67, 0.8, 0.9, 1.0, 1.1, 1.25, 1.5, 2.0, 4.0, 10.0),
}
"""Upper bounds, inclusive; one bucket more has what lies beyond the last."""


@dataclass(slots=True)
class Histogram:
    """Counts by `bounds`."""

    bounds: tuple[float, ...]
    counts: list[int] = field(default_factory=list)
    total: float = 0.0

    def __post_init__(self) -> None:
        self.counts = [0] * (len(self.bounds) + 1)

    def add(self, value: float | None) -> None:
        """None is no value."""
        if value is not None:
            self.counts[bisect_left(self.bounds, value)] += 1
            self.total += value


class Tally:
    """One pair's counts since the server started."""

    def __init__(self) -> None:
        self.verdicts = dict.fromkeys(VERDICTS, 0)
        self.dropped = dict.fromkeys(DROP_REASONS, 0)
        self.histograms = {name: Histogram(bounds) for name, bounds in BUCKETS.items()}

    @property
    def num_compared(self) -> int:
        return sum(self.verdicts.values())

    @property
    def num_diverged(self) -> int:
        return self.num_compared - self.verdicts[SAME]

    @property
    def num_alarms(self) -> int:
        return self.verdicts[ALARM]

    def take(self, found: Comparison) -> None:
        """One more comparison."""
        self.verdicts[found.verdict] += 1
        for name, histogram in self.histograms.items():
            histogram.add(getattr(found, name))


class Book:
    """Of the whole server. `pairs` are shown from the start, before anything was compared."""

    def __init__(self, pairs: Iterable[Pair] = ()) -> None:
        self.tallies: dict[Pair, Tally] = {pair: Tally() for pair in pairs}
        self._kept: deque[Comparison] = deque(maxlen=NUM_KEPT)

    def take(self, found: Comparison | Dropped) -> None:
        """What became of one copy."""
        tally = self.tallies.setdefault((found.kind, found.of, found.arm), Tally())
        if isinstance(found, Dropped):
            tally.dropped[found.reason] += 1
            return
        tally.take(found)
        if found.verdict != SAME:
            self._kept.append(found)

    def report(self) -> dict[str, Any]:
        """Of `/v1/shadow`: counts by pair, and the last divergences, newest first."""
        pairs = [
            {
                "kind": kind,
                "of": of,
                "arm": arm,
                "compared": tally.num_compared,
                "diverged": tally.num_diverged,
                "alarms": tally.num_alarms,
                "dropped": sum(tally.dropped.values()),
                "verdicts": dict(tally.verdicts),
                "dropped_by_reason": dict(tally.dropped),
            }
            for (kind, of, arm), tally in self.tallies.items()
        ]
        return {"object": "list", "pairs": pairs, "data": [asdict(found) for found in reversed(self._kept)]}
