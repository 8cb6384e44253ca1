"""Draft length where two kinds of draft compete: copies, which cost nothing, and a learned chain. Pure functions.

A row with a match may copy what follows it, or leave its drafts to the chain; what is copied may be followed by more of
the chain. Both are judged by the same measure, expected accepted drafts, from acceptance learned for each kind apart.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial

from server.spec.cost_table import CostTable
from server.spec.policy import HYSTERESIS, PolicyState, choose_ragged
from server.spec.probes import (
    MAX_CREDIT,
    NEVER,
    PLAIN,
    PROBE_SHARE,
    Probe,
    doubtful,
    is_due,
    postpone,
    price_probe,
    steps_to,
)

Survival = Sequence[float]

_CHAIN = "chain"


def joined(copy: Survival, learned: Survival) -> list[float]:
    """Survival of a draft that copies as long as `copy` is and then goes on with the chain, as long as `learned`."""
    found = list(copy[: len(learned)])
    for j in range(len(found), len(learned)):
        before = learned[j - 1] if j else 1.0
        found.append((found[-1] if found else 1.0) * (learned[j] / before if before > 0.0 else 0.0))
    return found


def loss_of_copying(copy: Survival, learned: Survival) -> float:
    """Share of a row's expected tokens that copying would lose against the chain; below 0 where it wins."""
    return 1.0 - (1.0 + sum(copy)) / (1.0 + sum(learned))


@dataclass(frozen=True, slots=True)
class Mixture:
    """What a step of `num_rows` rows can draft: `num_eligible` of them may draft at all.

    `copies` are groups of eligible rows with a match: survival of what they could copy, and how many rows. `learned` is
    the chain's survival, as long as the longest chain. `context` is the rows' mean length in tokens.
    """

    num_rows: int
    num_eligible: int
    copies: Sequence[tuple[Survival, float]]
    learned: Survival
    context: float

    def gain(self, k: int, chain: bool) -> float:
        """Expected accepted drafts of a step that drafts `k` tokens a row."""
        learned = sum(self.learned[:k]) if chain else 0.0
        total, rest = 0.0, float(self.num_eligible)
        for copy, count in self.copies:
            own = sum(joined(copy, self.learned[:k])) if chain else sum(copy[:k])
            total += count * max(own, learned)
            rest -= count
        return total + rest * learned


@dataclass(frozen=True, slots=True)
class Choice:
    """Draft `k` tokens a row, with the chain or by copying alone. k = 0: not at all."""

    k: int
    chain: bool


_NOTHING = Choice(0, False)


def choose_mixture(
    state: PolicyState, cost: CostTable, mixture: Mixture, tiers: Sequence[int], hysteresis: float = HYSTERESIS
) -> Choice:
    """The choice of a uniform k that emits most per millisecond.

    The same k holds for rows that copy and rows that do not, so what counts is the sum over the rows as they are now:
    a batch that copies long repeats gets a long k, the same requests get a short one where they write new text. More
    drafts than before, or the chain where it was off, must promise `hysteresis` more.
    """
    return _best(state, _rates(cost, mixture, tiers), hysteresis)


def _best(state: PolicyState, rates: Mapping[Choice, float], hysteresis: float) -> Choice:
    def worth(choice: Choice) -> float:
        longer = choice.k > state.previous_k or (choice.chain and not state.previous_chain)
        return rates[choice] / (1.0 + hysteresis) if longer else rates[choice]

    return max(rates, key=worth)


def plan_mixture(
    state: PolicyState, cost: CostTable, mixture: Mixture, tiers: Sequence[int], hysteresis: float = HYSTERESIS
) -> tuple[Choice, PolicyState]:
    """`choose_mixture`, and now and then a probe of what it advises against. Returns it and the next state."""
    rates = _rates(cost, mixture, tiers)
    best = _best(state, rates, hysteresis)
    credit, probes = min(state.credit + PROBE_SHARE, MAX_CREDIT), dict(state.probes)
    in_doubt = partial(_in_doubt, cost, mixture, rates, best)
    found: tuple[Choice, float] | None = None
    probe_in = 0 if best.chain else NEVER
    if best.k == 0:
        postpone(probes, PLAIN)
    elif mixture.num_rows and is_due(probes, PLAIN, loss := 1.0 - rates[_NOTHING] / rates[best], credit):
        found = _NOTHING, loss
    if best.chain:
        probes.pop(_CHAIN, None)
    elif (other := Choice(best.k or min(tiers, default=0), True)) in rates:
        # Judged by cost alone: the chain's estimate may be what is wrong, and a probe of it may gain nothing.
        loss = _slowdown(cost, mixture, best, other)
        if found is None and is_due(probes, _CHAIN, loss, credit):
            found = other, loss
            if best.k == 0 and (dear := in_doubt()) is not None and dear[1] <= credit:
                found = dear
        probe_in = steps_to(probes.get(_CHAIN, Probe()), loss, credit - (max(0.0, found[1]) if found else 0.0))
    if found is None and best.k > 0:
        found = price_probe(probes, credit, in_doubt)
    tried, loss = found or (best, 0.0)
    state = PolicyState(best.k, probes, credit - max(0.0, loss), probe_in, rates[best] / rates[_NOTHING], best.chain)
    return tried, state


def _rates(cost: CostTable, mixture: Mixture, tiers: Sequence[int]) -> dict[Choice, float]:
    """Tokens per millisecond of every choice."""
    rows = mixture.num_rows
    ks = sorted({0, *tiers})
    rates = {_NOTHING: rows / cost.step_ms(rows, 0, mixture.context)} if rows else {_NOTHING: 1.0}
    for k in ks[1:] if rows else ():
        with_chain = cost.step_ms(rows, k, mixture.context)
        for chain, ms in ((False, with_chain - cost.draft_ms(rows, k)), (True, with_chain)):
            rates[Choice(k, chain)] = (rows + mixture.gain(k, chain)) / ms
    return rates


def _in_doubt(
    cost: CostTable, mixture: Mixture, rates: Mapping[Choice, float], best: Choice
) -> tuple[Choice, float] | None:
    """Another k for what is done now, or, where nothing is, for the chain, whose price is in doubt; what it loses."""
    drafts = {choice: choice.k for choice in rates if choice == best or choice.chain == (best.chain or best.k == 0)}
    found = doubtful(cost, rates, drafts, best, mixture.num_rows, mixture.context)
    if found is None:
        return None
    return found, max(0.0, 1.0 - rates[found] / rates[best]) if best.k else _slowdown(cost, mixture, best, found)


def _slowdown(cost: CostTable, mixture: Mixture, best: Choice, other: Choice) -> float:
    rows = mixture.num_rows
    without = cost.step_ms(rows, best.k, mixture.context) - cost.draft_ms(rows, best.k)
    return max(0.0, cost.step_ms(rows, other.k, mixture.context) / without - 1.0)


def plan_chain(
    state: PolicyState,
    cost: CostTable,
    copies: Sequence[Survival],
    learned: Sequence[Survival],
    context: float,
    tiers: Sequence[int],
    hysteresis: float = HYSTERESIS,
) -> tuple[int, PolicyState]:
    """How long a chain to run for the rows of a ragged step that do not copy; 0: for none.

    `copies` [R][drafts of row r] are of drafts that exist, `learned` [R][most drafts of row r] of those the chain would
    make ([]: the row takes its copy, or may not draft). Rows are cut to what pays once their drafts exist, as
    `choose_ragged` does, so that is how each length is priced here.
    """
    widest = max(map(len, learned), default=0)
    num_chained = sum(map(bool, learned))
    ks = sorted({0, *(k for k in tiers if k <= widest)} | {widest})
    best_k, best_rate = 0, 0.0
    for k in ks:
        rate = _ragged_rate(cost, copies, [row[:k] for row in learned], context, k, num_chained)
        if k > state.previous_k:
            rate /= 1.0 + hysteresis
        if rate > best_rate:
            best_k, best_rate = k, rate
    probes = dict(state.probes)  # credit for probes is earned where the drafts are cut
    if best_k > 0:
        probes.pop(_CHAIN, None)
    elif len(ks) > 1:
        smallest, rows = ks[1], len(copies)
        tokens = rows + num_chained * smallest
        ms = cost.verify_ms(rows, tokens, context) + cost.draft_ms(num_chained, smallest)
        loss = max(0.0, ms / cost.verify_ms(rows, rows, context) - 1.0)
        if is_due(probes, _CHAIN, loss, state.credit):
            return smallest, replace(state, previous_k=0, probes=probes, credit=state.credit - loss)
    return best_k, replace(state, previous_k=best_k, probes=probes)


def _ragged_rate(
    cost: CostTable, copies: Sequence[Survival], learned: Sequence[Survival], context: float, k: int, num_chained: int
) -> float:
    survivals = [chained or copy for copy, chained in zip(copies, learned, strict=True)]
    counts = choose_ragged(cost, survivals, context)
    emitted = len(copies) + sum(sum(row[:count]) for row, count in zip(survivals, counts, strict=True))
    ms = cost.verify_ms(len(copies), len(copies) + sum(counts), context)
    return emitted / (ms + (cost.draft_ms(num_chained, k) if k else 0.0))


def take_copy(state: PolicyState, name: str, copy: Survival, learned: Survival) -> tuple[bool, PolicyState]:
    """Whether a row with a match of class `name` copies rather than leaving its drafts to the chain.

    Where the chain promises more, a copy is tried now and then, so that a class whose estimate is too low comes back.
    """
    loss, key = loss_of_copying(copy, learned), f"copy {name}"
    if loss <= 0.0:
        if key in state.probes:
            state = replace(state, probes={n: p for n, p in state.probes.items() if n != key})
        return True, state
    probes = dict(state.probes)
    due = is_due(probes, key, loss, state.credit)
    return due, replace(state, probes=probes, credit=state.credit - loss if due else state.credit)
