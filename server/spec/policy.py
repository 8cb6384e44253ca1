"""Draft length: how many tokens to draft so that the expected emitted tokens per second are the most. Pure functions.

With survival probabilities s_j (draft j is accepted), a step of R rows emits R + sum(s) tokens on average, the R being
one new token a row that comes in any case. The step that maximises this over its cost maximises throughput; where no
draft pays the answer is 0. `survivals` are of the rows of one verify step: prefills neither count nor are drafted for.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace

from server.spec.cost_table import CostTable

Survivals = Sequence[Sequence[float]]

PROBE_SHARE = 0.008
"""Share of the time that may go to drafts which the estimates advise against."""
_FIRST_PROBE_INTERVAL = 2
_MAX_PROBE_INTERVAL = 64
_FIRST_CREDIT = 1.0
_MAX_CREDIT = 4.0
_ALL_ROWS = "all rows"


def choose_uniform(
    cost: CostTable,
    survivals: Survivals,
    context: float,
    tiers: Sequence[int],
    previous_k: int = 0,
    hysteresis: float = 0.03,
) -> int:
    """The k of `tiers` or 0, the same for every row, that emits most per millisecond of drafting and verifying.

    `survivals` [R][at most max k] are non-increasing. A longer draft than `previous_k` must promise `hysteresis` more,
    a shorter one is taken at once: estimates which waver around a threshold do not make k waver, and staying is free.
    """
    num_rows = len(survivals)
    if num_rows == 0:
        return 0
    gains = _column_sums(survivals, max(tiers, default=0))
    best_k, best_rate = 0, 0.0
    for k in sorted({0, *tiers}):
        ms = cost.verify_ms(num_rows, num_rows * (1 + k), context) + cost.draft_ms(num_rows, k)
        rate = (num_rows + gains[k]) / ms
        if k > previous_k:
            rate /= 1.0 + hysteresis
        if rate > best_rate:
            best_k, best_rate = k, rate
    return best_k


def _column_sums(survivals: Survivals, max_k: int) -> list[float]:
    """Expected accepted drafts of all rows together, for k = 0 … max_k."""
    sums = [0.0] * (max_k + 1)
    for row in survivals:
        for position, survival in enumerate(row[:max_k]):
            sums[position + 1] += survival
    for k in range(max_k):
        sums[k + 1] += sums[k]
    return sums


def choose_ragged(cost: CostTable, survivals: Survivals, context: float, min_gain: float = 0.01) -> list[int]:
    """How many of its drafts each row should verify, given drafts that exist already (their cost is spent).

    `survivals` [R][drafts of row r] are non-increasing. Draft tokens are handed out by descending survival, which for
    m tokens is the best choice of m; every m is priced, because measured cost is neither convex nor monotone. Drafting
    at all must promise `min_gain` more than plain decoding.
    """
    counts, _ = _choose_ragged(cost, survivals, context, min_gain)
    return counts


def _choose_ragged(
    cost: CostTable, survivals: Survivals, context: float, min_gain: float
) -> tuple[list[int], list[float]]:
    """The choice of `choose_ragged`, and the cost of the step with 0, 1, … all drafts."""
    num_rows = len(survivals)
    counts = [0] * num_rows
    if num_rows == 0:
        return counts, []
    # Python's sort is stable and rows list their survivals in order, so a row's drafts stay a prefix under ties.
    order = sorted(((-survival, row) for row, values in enumerate(survivals) for survival in values), key=_first)
    curve = cost.verify_curve(num_rows, num_rows + len(order), context)
    emitted = float(num_rows)
    best_rate, best_size = emitted / curve[0] * (1.0 + min_gain), 0
    for size, (negative_survival, _) in enumerate(order, start=1):
        emitted -= negative_survival
        rate = emitted / curve[size]
        if rate > best_rate:
            best_rate, best_size = rate, size
    for _, row in order[:best_size]:
        counts[row] += 1
    return counts, curve


def _first(item: tuple[float, int]) -> float:
    return item[0]


@dataclass(frozen=True, slots=True)
class Probe:
    """A kind of draft that does not pay is tried again after `wait` more steps that could, then every `interval`."""

    wait: int = _FIRST_PROBE_INTERVAL
    interval: int = _FIRST_PROBE_INTERVAL


@dataclass(frozen=True, slots=True)
class PolicyState:
    """What the policy remembers between steps.

    `previous_k` is the last uniform k, `probes` are by class. `credit` is the time that probes may cost, in steps: it
    starts with one, so that unknown classes are tried early, and grows by `PROBE_SHARE` a step.
    """

    previous_k: int = 0
    probes: Mapping[str, Probe] = field(default_factory=dict)
    credit: float = _FIRST_CREDIT


def plan_ragged(
    state: PolicyState, cost: CostTable, classes: Sequence[str], survivals: Survivals, context: float
) -> tuple[list[int], PolicyState]:
    """`choose_ragged`, and now and then one or two drafts of a class that was trimmed to nothing.

    `classes` [R] name each row's kind of draft. Returns the drafts to verify per row and the next state.
    """
    counts, curve = _choose_ragged(cost, survivals, context, 0.01)
    if not curve:
        return counts, state
    num_drafts = sum(counts)
    drafted: set[str] = set()
    trimmed: dict[str, int] = {}
    for row, name in enumerate(classes):
        if counts[row]:
            drafted.add(name)
        elif survivals[row]:
            trimmed.setdefault(name, row)
    idle = [name for name in trimmed if name not in drafted]
    credit = min(state.credit + PROBE_SHARE, _MAX_CREDIT)
    if not idle and drafted.isdisjoint(state.probes):
        return counts, replace(state, credit=credit)
    probes = {name: probe for name, probe in state.probes.items() if name not in drafted}
    due: str | None = None
    for name in idle:
        probe = probes.get(name, Probe())
        probes[name] = replace(probe, wait=max(0, probe.wait - 1))
        if due is None and probe.wait <= 1:
            due = name
    if due is not None:
        loss, negative_size = min(
            (max(0.0, curve[num_drafts + size] / curve[num_drafts] - 1.0), -size)
            for size in range(1, min(2, len(survivals[trimmed[due]])) + 1)
        )
        if loss <= credit:
            counts[trimmed[due]] = -negative_size
            credit -= loss
            probes[due] = _backed_off(probes[due])
    return counts, replace(state, probes=probes, credit=credit)


def plan_uniform(
    state: PolicyState,
    cost: CostTable,
    survivals: Survivals,
    context: float,
    tiers: Sequence[int],
    hysteresis: float = 0.03,
) -> tuple[int, PolicyState]:
    """`choose_uniform`, and now and then the smallest k while it says 0. Returns k and the next state."""
    num_rows = len(survivals)
    k = choose_uniform(cost, survivals, context, tiers, state.previous_k, hysteresis)
    smallest = min((tier for tier in tiers if tier > 0), default=0)
    if num_rows == 0 or smallest == 0:
        return k, state
    credit = min(state.credit + PROBE_SHARE, _MAX_CREDIT)
    if k > 0:
        return k, PolicyState(previous_k=k, credit=credit)
    probe = state.probes.get(_ALL_ROWS, Probe())
    probe = replace(probe, wait=max(0, probe.wait - 1))
    probe_ms = cost.verify_ms(num_rows, num_rows * (1 + smallest), context) + cost.draft_ms(num_rows, smallest)
    loss = max(0.0, probe_ms / cost.verify_ms(num_rows, num_rows, context) - 1.0)
    if probe.wait > 0 or loss > credit:
        return 0, PolicyState(probes={_ALL_ROWS: probe}, credit=credit)
    return smallest, PolicyState(probes={_ALL_ROWS: _backed_off(probe)}, credit=credit - loss)


def record(state: PolicyState, cls: str | None, num_accepted: int) -> PolicyState:
    """Tell the policy how a row's drafts of class `cls` (None after `plan_uniform`) fared.

    A probe that was accepted makes the next ones frequent again: a class that turned good is back within a few tries.
    """
    name = _ALL_ROWS if cls is None else cls
    if num_accepted == 0 or name not in state.probes:
        return state
    return replace(state, probes={**state.probes, name: Probe(wait=1, interval=_FIRST_PROBE_INTERVAL)})


def _backed_off(probe: Probe) -> Probe:
    interval = min(2 * probe.interval, _MAX_PROBE_INTERVAL)
    return Probe(wait=interval, interval=interval)
