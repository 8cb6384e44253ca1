"""How requests may end. Each ends in exactly one way; what is in no list here is a finding."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field

from loadtest.record import CANCELLED, OK, Record

ANSWERED, LEFT, REFUSED, REJECTED, FAILED, UNDEFINED = (
    *("answered", "left", "refused", "rejected", "failed", "undefined"),
)
"""A whole answer; the client went; not now (429, 503); never (4xx); an error that was told while an engine was
away; none of these."""

NOT_NOW = (429, 503)
NEVER = (400, 404, 405, 408, 413, 415, 422, 431)
_ENGINE_AWAY = ("http_500", "http_502", "http_503", "disconnected")


@dataclass(frozen=True, slots=True)
class End:
    """One request's end: what kind of request it was, its way, and what was seen. Times are seconds since the start."""

    kind: str
    way: str
    seen: str
    sent: float
    ended: float
    first_token: float | None = None


@dataclass(slots=True)
class Outages:
    """When engines were killed, and when the server was ready again (infinity: not yet)."""

    spans: list[list[float]] = field(default_factory=list)

    def overlap(self, sent: float, ended: float) -> bool:
        """Whether a request lived through one, in part."""
        return any(begin <= ended and sent <= end for begin, end in self.spans)


def way_of_stream(record: Record, outages: Outages) -> tuple[str, str]:
    """The way of a well-formed streamed request, and what was seen."""
    seen = f"{record.end} {record.message}".strip()
    if record.end == OK:
        return ANSWERED, OK
    if record.end == CANCELLED:
        return LEFT, CANCELLED
    if record.end in tuple(f"http_{status}" for status in NOT_NOW):
        return REFUSED, record.end
    told = record.end.startswith("stream_") or record.end in _ENGINE_AWAY
    if told and outages.overlap(record.sent, record.ended):
        return FAILED, record.end
    return UNDEFINED, seen


def way_of_status(status: int, has_error: bool, wrong: bool, away: bool) -> str:
    """The way of an answer that is no stream. `wrong`: the request was, so that an answer of 200 is a finding."""
    if status == 200:
        return UNDEFINED if wrong or has_error else ANSWERED
    if not has_error:
        return UNDEFINED
    if status in NOT_NOW:
        return REFUSED
    if status in NEVER:
        return REJECTED if wrong else UNDEFINED
    return FAILED if away else UNDEFINED


def tally(ends: Iterable[End]) -> dict[str, dict[str, int]]:
    """Counts by kind and way."""
    found: dict[str, Counter[str]] = {}
    for end in ends:
        found.setdefault(end.kind, Counter())[end.way] += 1
    return {kind: dict(counts.most_common()) for kind, counts in sorted(found.items())}


def undefined(ends: Sequence[End]) -> dict[str, int]:
    """What was seen of the requests without a defined end, by kind."""
    return dict(Counter(f"{end.kind}: {end.seen[:120]}" for end in ends if end.way == UNDEFINED).most_common(20))
