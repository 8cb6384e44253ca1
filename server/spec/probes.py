"""When to try what the estimates advise against, and which of it. Pure functions.

All probes of an engine are paid from one credit, the share of the time that may be lost to them (see policy.py), so
however much there is to find out, drafting is slower than the estimates' choice by that share at most.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import TypeVar

from server.spec.cost_table import CostTable

T = TypeVar("T")

PROBE_SHARE = 0.008
"""Share of the time that may go to drafts which the estimates advise against."""
MAX_CREDIT = 4.0
NEVER = 1 << 30
"""Steps until a probe that no credit will pay for."""
PLAIN = "plain"
_PRICE = "price"
_FIRST_INTERVAL = 2
_PRICE_INTERVAL = 4
_MAX_INTERVAL = 64
_MIN_GAIN = 0.01
"""A price that is wrong by less than this is not worth finding out."""


@dataclass(frozen=True, slots=True)
class Probe:
    """When to try what the estimates advise against: after `wait` more steps that could, then every `interval`.

    Kinds of draft that do not pay are tried so that they can come back. A step without drafts is tried so that the cost
    table, corrected only where steps are measured, can not praise drafting for ever on a plain cost it got wrong; other
    numbers of drafts so that none is held too dear for ever.
    """

    wait: int = _FIRST_INTERVAL
    interval: int = _FIRST_INTERVAL


_FIRST_PROBES = {PLAIN: Probe(wait=4, interval=8)}


def steps_to(probe: Probe, loss: float, credit: float) -> int:
    """Steps until `probe` is due and can be paid for."""
    if loss > MAX_CREDIT:
        return NEVER
    return max(1, probe.wait, math.ceil((loss - credit) / PROBE_SHARE))


def is_due(probes: dict[str, Probe], name: str, loss: float, credit: float) -> bool:
    """Count one step towards the probe `name`; True, and the next one is farther off, if it is due and affordable."""
    probe = probes.get(name) or _FIRST_PROBES.get(name, Probe())
    wait = max(0, probe.wait - 1)
    due = wait == 0 and loss <= credit
    interval = min(2 * probe.interval, _MAX_INTERVAL) if due else probe.interval
    probes[name] = Probe(wait=interval if due else wait, interval=interval)
    return due


def postpone(probes: dict[str, Probe], name: str) -> None:
    """What a probe would show was just seen anyway."""
    if name in probes:
        probes[name] = replace(probes[name], wait=probes[name].interval)


def restarted() -> Probe:
    """A probe that showed something: again in the next step, and often from then on."""
    return Probe(wait=1, interval=_FIRST_INTERVAL)


def price_probe(
    probes: dict[str, Probe], credit: float, find: Callable[[], tuple[T, float] | None]
) -> tuple[T, float] | None:
    """Count one step towards the next look for a price in doubt; what to try now and what that loses, in steps, if
    there is something and it is affordable.

    `find` says what to try and what that would lose. Nothing is tried that a probe for plain steps, which keep drafting
    honest, saves up for. Looks are seldom while nothing is in doubt, since they cost the host some time.
    """
    if PLAIN in probes and probes[PLAIN].wait == 0:
        return None
    probe = probes.get(_PRICE) or Probe(_PRICE_INTERVAL, _PRICE_INTERVAL)
    if probe.wait > 1:
        probes[_PRICE] = replace(probe, wait=probe.wait - 1)
        return None
    found = find()
    if found is None:
        interval = min(2 * probe.interval, _MAX_INTERVAL)
        probes[_PRICE] = Probe(interval, interval)
        return None
    loss = found[1]
    if loss > credit:
        probes[_PRICE] = Probe(min(steps_to(Probe(), loss, credit), _MAX_INTERVAL), _PRICE_INTERVAL)
        return None
    probes[_PRICE] = Probe(_PRICE_INTERVAL, _PRICE_INTERVAL)
    return found


def doubtful(
    cost: CostTable, rates: Mapping[T, float], drafts: Mapping[T, int], best: T, num_rows: int, context: float
) -> T | None:
    """The choice that would beat `best` by most if the table were off in its favour by one standard deviation of what
    it knows (upper confidence bounds: Auer et al., 2002); None if none would.

    `rates` are tokens a millisecond and `drafts` the drafts a row, of each choice. As steps are measured doubts fall,
    and what is dear for certain is not tried any more until they have risen again.
    """
    most, found = rates[best] * (1.0 + _MIN_GAIN), None
    own = num_rows * (1 + drafts[best])
    for choice, num_drafts in drafts.items():
        if choice == best or num_drafts == 0:
            continue
        hopeful = rates[choice] * math.exp(cost.doubt(num_rows, num_rows * (1 + num_drafts), own, context))
        if hopeful > most:
            most, found = hopeful, choice
    return found
