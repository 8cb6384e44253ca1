"""What a soak must show."""

from __future__ import annotations

import math
from dataclasses import dataclass

from loadtest.soak import watch
from loadtest.soak.run import Soaked, median
from loadtest.soak.settings import SoakSettings
from loadtest.soak.ways import ANSWERED, FAILED, LEFT, UNDEFINED, tally, undefined

_MORE_DESCRIPTORS = 8
"""Lines that a server opens once and keeps; a leak is of hundreds."""
_RECOVERY_SLACK_S = 0.1


@dataclass(frozen=True, slots=True)
class Check:
    """`holds` None: could not be checked, for the reason in `told`."""

    name: str
    holds: bool | None
    told: str

    def __str__(self) -> str:
        return (
            f"{'not checked' if self.holds is None else 'holds' if self.holds else 'FAILS'}: {self.name}: {self.told}"
        )


def checks(seen: Soaked, soak: SoakSettings) -> list[Check]:
    """Everything that a soak is for."""
    return [
        _accounted(seen),
        _defined(seen),
        _counted(seen),
        _at_rest(seen),
        _memory(seen, soak),
        _descriptors(seen),
        _latency(seen, soak),
        _engines(seen, soak),
    ]


def lines(seen: Soaked, found: list[Check]) -> list[str]:
    """The report: ends by kind, then the checks."""
    told = []
    for kind, counts in tally(seen.ends).items():
        told.append(f"{kind:10} " + "  ".join(f"{way} {count}" for way, count in counts.items()))
    told += [f"  {count} x {what}" for what, count in undefined(seen.ends).items()]
    return [*told, *map(str, found)]


def _accounted(seen: Soaked) -> Check:
    lost = seen.begun - len(seen.ends)
    return Check("every request has an end", lost == 0, f"{seen.begun} begun, {len(seen.ends)} ended")


def _defined(seen: Soaked) -> Check:
    wrong = sum(end.way == UNDEFINED for end in seen.ends)
    return Check("every end is a defined one", wrong == 0, f"{wrong} are not")


def _counted(seen: Soaked) -> Check:
    """The server's own count of whole answers against the client's; those whose client left may be in either."""
    name = "the server counts what the client saw"
    reasons = [f"outpace_requests_total {reason}" for reason in ("stop", "length")]
    before, after = seen.metrics[0], seen.metrics[-1]
    if reasons[0] not in after or seen.kills:
        return Check(name, None, "an engine was killed" if seen.kills else "no such counters")
    counted = sum(after[reason] - before[reason] for reason in reasons)
    # The first calm came before the first reading.
    ends = [end for end in seen.ends if end.sent > _first_calm_end(seen)]
    whole = sum(end.way == ANSWERED for end in ends)
    left = sum(end.way in (LEFT, FAILED) for end in ends)
    return Check(
        name, whole <= counted <= whole + left, f"{counted:g} counted, {whole} seen, {left} left before the end"
    )


def _first_calm_end(seen: Soaked) -> float:
    return max((end.ended for end in seen.ends[: len(seen.alone[0])]), default=0.0)


def _at_rest(seen: Soaked) -> Check:
    name, found = "no blocks, slots or requests are held", watch.gauges(seen.metrics[-1])
    if not found:
        return Check(name, None, "the server has no such gauges")
    told = ", ".join(f"{gauge.partition('_')[2] or gauge} {value:g}" for gauge, value in found.items())
    return Check(name, seen.rested_s is not None and not any(found.values()), told)


def _memory(seen: Soaked, soak: SoakSettings) -> Check:
    # An engine that is starting takes its memory then.
    serving = [one for one in seen.samples if not any(begin <= one.at <= end for begin, end in seen.kills)]
    name, growth = "memory does not grow", watch.rss_growth(serving)
    if math.isnan(growth):
        return Check(name, None, "needs --server-pid and some seconds between two kills")
    last = seen.samples[-1].rss / 1e6
    return Check(name, growth <= soak.rss_growth, f"{growth:+.2%} of at most {soak.rss_growth:.1%}; {last:.0f} MB")


def _descriptors(seen: Soaked) -> Check:
    name = "file descriptors are given back"
    if len(seen.idle) < 2:
        return Check(name, None, "needs --server-pid")
    before, after = seen.idle[0].descriptors, seen.idle[-1].descriptors
    return Check(name, after <= before + _MORE_DESCRIPTORS, f"{before} before, {after} after")


def _latency(seen: Soaked, soak: SoakSettings) -> Check:
    before, after = median(seen.alone[0]), median(seen.alone[-1])
    told = f"a request alone took {1e3 * before:.0f} ms before, {1e3 * after:.0f} ms after"
    return Check("latency recovers", after <= soak.slower * before + _RECOVERY_SLACK_S, told)


def _engines(seen: Soaked, soak: SoakSettings) -> Check:
    name = "a killed engine comes back"
    if not seen.kills:
        return Check(name, None, "none was killed")
    slowest = max(end - begin for begin, end in seen.kills)
    return Check(name, slowest < math.inf, f"{len(seen.kills)} killed, back within {slowest:.1f} s")
