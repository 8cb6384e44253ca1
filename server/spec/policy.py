"""Draft length: how many tokens to draft so that the expected emitted tokens per second are the most. Pure functions.

With survival probabilities s_j (draft j is accepted), a step of R rows emits R + sum(s) tokens on average, the R being
one new token a row that comes in any case. The step that maximises this over its cost maximises throughput; where no
draft pays the answer is 0. `survivals` are of the rows of one verify step: prefills neither count nor are drafted for.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from itertools import accumulate
from typing import overload

from server.spec.cost_table import CostTable
from server.spec.probes import (
    MAX_CREDIT,
    PLAIN,
    PROBE_SHARE,
    Probe,
    doubtful,
    is_due,
    postpone,
    price_probe,
    restarted,
    steps_to,
)

Survivals = Sequence[Sequence[float]]

HYSTERESIS = 0.01
"""What more drafts than before, or a chain where there was none, must promise above what is done now: of one k for all
rows, of copies and a chain, and of ragged drafts against none. Simulated, 0.03 cost a per cent of the best fixed
length, and estimates that waver less than this change nothing."""
_FIRST_CREDIT = 1.0
_MAX_DEBT = 64.0
_ALL_ROWS = "all rows"


@dataclass(frozen=True, slots=True)
class RowsAlike(Sequence[Sequence[float]]):
    """Survivals of `num_rows` rows of which `num_eligible` draft with the same `survival`, the others not at all: what
    a list of them says, at the price of one row."""

    survival: Sequence[float]
    num_eligible: int
    num_rows: int

    def __len__(self) -> int:
        return self.num_rows

    @overload
    def __getitem__(self, index: int) -> Sequence[float]: ...
    @overload
    def __getitem__(self, index: slice) -> Survivals: ...
    def __getitem__(self, index: int | slice) -> Sequence[float] | Survivals:
        rows = [self.survival] * self.num_eligible + [()] * (self.num_rows - self.num_eligible)
        return rows[index]


def choose_uniform(
    cost: CostTable,
    survivals: Survivals,
    context: float,
    tiers: Sequence[int],
    previous_k: int = 0,
    hysteresis: float = HYSTERESIS,
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
        rate = (num_rows + gains[k]) / cost.step_ms(num_rows, k, context)
        if k > previous_k:
            rate /= 1.0 + hysteresis
        if rate > best_rate:
            best_k, best_rate = k, rate
    return best_k


def best_draft(cost: CostTable, survival: Sequence[float], rows: int, context: float, tiers: Sequence[int]) -> str:
    """In words, what the best k of `tiers` but 0 promises `rows` rows that all survive alike."""
    gains = _column_sums([survival], max(tiers))
    plain_ms = cost.verify_ms(rows, rows, context)
    dear = {k: (cost.verify_ms(rows, rows * (1 + k), context) + cost.draft_ms(rows, k)) / plain_ms for k in tiers if k}
    k = max(dear, key=lambda k: (1.0 + gains[k]) / dear[k])
    return f"at best k = {k}: {1.0 + gains[k]:.2f} tokens a step in {dear[k]:.2f} times the time, batch {rows}"


def _column_sums(survivals: Survivals, max_k: int) -> list[float]:
    """Expected accepted drafts of all rows together, for k = 0 … max_k."""
    if isinstance(survivals, RowsAlike):
        known = survivals.survival[:max_k]
        alike = [0.0, *accumulate(survivals.num_eligible * value for value in known)]
        return alike + [alike[-1]] * (max_k - len(known))
    sums = [0.0] * (max_k + 1)
    for row in survivals:
        for position, survival in enumerate(row[:max_k]):
            sums[position + 1] += survival
    for k in range(max_k):
        sums[k + 1] += sums[k]
    return sums


def choose_ragged(cost: CostTable, survivals: Survivals, context: float, min_gain: float = HYSTERESIS) -> list[int]:
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
class PolicyState:
    """What the policy remembers between steps.

    `previous_k` is the last uniform k, and `previous_chain` whether a hybrid drafter's chain was to run, probes apart;
    `probes` are by class. `credit` is the time that probes may cost, in steps: it starts with one, so that unknown
    classes are tried early, and grows by `PROBE_SHARE` a step. `probe_in` is the number of steps until drafts (of a
    hybrid drafter: its chain) are tried again where the choice is to do without (1: in the next one), as far as can be
    told: a drafter that needs to see some steps before it drafts is shown those. `speedup` is what the last choice,
    probes apart, promised: tokens per second over those of plain decoding.
    """

    previous_k: int = 0
    probes: Mapping[str, Probe] = field(default_factory=dict)
    credit: float = _FIRST_CREDIT
    probe_in: int = 0
    speedup: float = 1.0
    previous_chain: bool = False


def plan_ragged(
    state: PolicyState, cost: CostTable, classes: Sequence[str], survivals: Survivals, context: float
) -> tuple[list[int], PolicyState]:
    """`choose_ragged`, and now and then a probe: a draft of a class trimmed to nothing, or a step without drafts.

    `classes` [R] name each row's kind of draft. Returns the drafts to verify per row and the next state.
    """
    counts, curve = _choose_ragged(cost, survivals, context, HYSTERESIS)
    num_drafts = sum(counts)
    if not curve:
        return counts, state
    drafted = {name for name, count in zip(classes, counts, strict=True) if count}
    trimmed = {name: row for row, name in enumerate(classes) if survivals[row] and name not in drafted}
    probes = {name: probe for name, probe in state.probes.items() if name not in drafted}
    credit = min(state.credit + PROBE_SHARE, MAX_CREDIT)
    if num_drafts:
        emitted = len(counts) + sum(sum(row[:count]) for row, count in zip(survivals, counts, strict=True))
        loss = 1.0 - len(counts) / emitted * curve[num_drafts] / curve[0]
        state = replace(state, speedup=1.0 / (1.0 - loss))
        if is_due(probes, PLAIN, loss, credit):
            return [0] * len(counts), replace(state, probes=probes, credit=credit - max(0.0, loss))
    else:
        state = replace(state, speedup=1.0)
        postpone(probes, PLAIN)
    for name, row in trimmed.items():
        loss, size = _cheapest_probe(curve, num_drafts, len(survivals[row]))
        if is_due(probes, name, loss, credit):
            counts[row] = size
            return counts, replace(state, probes=probes, credit=credit - loss)
    return counts, replace(state, probes=probes, credit=credit)


def _cheapest_probe(curve: Sequence[float], num_drafts: int, available: int) -> tuple[float, int]:
    """What one or two drafts more cost, in steps, and which of the two costs less; two where that is as cheap."""
    losses = [max(0.0, curve[num_drafts + size] / curve[num_drafts] - 1.0) for size in range(1, min(2, available) + 1)]
    return min(losses), len(losses) if losses[-1] <= losses[0] else 1


def plan_uniform(
    state: PolicyState,
    cost: CostTable,
    survivals: Survivals,
    context: float,
    tiers: Sequence[int],
    hysteresis: float = HYSTERESIS,
) -> tuple[int, PolicyState]:
    """`choose_uniform`, and now and then a probe: of 0 while it says more, of drafts while it says 0, and of every
    other k whose price, as far as it is in doubt, keeps it from being the best. Returns k and the next state.

    While it says 0 a probe is of the smallest k, or of one that is in doubt; the drafter is told of it beforehand.
    """
    num_rows = len(survivals)
    k = choose_uniform(cost, survivals, context, tiers, state.previous_k, hysteresis)
    smallest = min((tier for tier in tiers if tier > 0), default=0)
    if num_rows == 0 or smallest == 0:
        return k, state
    credit = min(state.credit + PROBE_SHARE, MAX_CREDIT)
    probes = dict(state.probes)
    plain_ms = cost.step_ms(num_rows, 0, context)
    in_doubt = partial(_in_doubt, cost, survivals, context, tiers, k)
    other: int | None = None
    if k > 0:
        probes.pop(_ALL_ROWS, None)
        emitted = num_rows + _column_sums(survivals, k)[k]
        loss = 1.0 - num_rows / emitted * cost.step_ms(num_rows, k, context) / plain_ms
        speedup, probe_in = 1.0 / (1.0 - loss), 0
        if is_due(probes, PLAIN, loss, credit):
            other = 0
        elif found := price_probe(probes, credit, in_doubt):
            other, loss = found
    else:
        postpone(probes, PLAIN)
        speedup, loss = 1.0, cost.step_ms(num_rows, smallest, context) / plain_ms - 1.0
        if is_due(probes, _ALL_ROWS, loss, credit):
            other = smallest
            found = in_doubt()
            if found is not None and found[1] <= credit:
                other, loss = found
        probe_in = steps_to(probes[_ALL_ROWS], loss, credit - (max(0.0, loss) if other else 0.0))
    if other is None:
        return k, PolicyState(k, probes, credit, probe_in, speedup)
    return other, PolicyState(k, probes, credit - max(0.0, loss), probe_in, speedup)


def _in_doubt(
    cost: CostTable, survivals: Survivals, context: float, tiers: Sequence[int], k: int
) -> tuple[int, float] | None:
    """Another number of drafts than `k` whose price is in doubt, and what trying it loses, in steps."""
    num_rows, gains = len(survivals), _column_sums(survivals, max(tiers))
    costs = {size: cost.step_ms(num_rows, size, context) for size in {0, *tiers}}
    rates = {size: (num_rows + gains[size]) / ms for size, ms in costs.items()}
    size = doubtful(cost, rates, {size: size for size in rates}, k, num_rows, context)
    if size is None:
        return None
    # Where drafts do not pay their acceptance may be what is wrong: they are judged by cost alone.
    return size, max(0.0, 1.0 - rates[size] / rates[k] if k else costs[size] / costs[0] - 1.0)


def record(state: PolicyState, cls: str | None, num_accepted: int) -> PolicyState:
    """Tell the policy how a row's drafts of class `cls` (None after `plan_uniform`) fared.

    A probe that was accepted makes the next ones frequent again: a class that turned good is back within a few tries.
    """
    name = _ALL_ROWS if cls is None else cls
    if num_accepted == 0 or name not in state.probes:
        return state
    probes = {**state.probes, name: restarted()}
    return replace(state, probes=probes, probe_in=min(state.probe_in, 1))


def charge(state: PolicyState, excess: float) -> PolicyState:
    """Drafting again cost `excess` steps more than drafts do, since the drafter had to catch up: probes pay for it.

    Up to a bound, so that what happens once (a kernel that is compiled) does not end all probes.
    """
    return replace(state, credit=max(state.credit - max(0.0, excess), -_MAX_DEBT))
