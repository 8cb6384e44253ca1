from __future__ import annotations

import random
from collections.abc import Callable
from dataclasses import replace
from itertools import pairwise, product

import numpy as np
import pytest

from server.spec.acceptance import AcceptanceTracker
from server.spec.cost_table import CostGrid, CostTable
from server.spec.policy import (
    PolicyState,
    best_draft,
    charge,
    choose_ragged,
    choose_uniform,
    plan_ragged,
    plan_uniform,
    record,
)
from server.spec.probes import Probe

CONTEXT = 500
MEASURED = {1: 22, 2: 25, 3: 18, 4: 18, 6: 18, 8: 24, 12: 26, 16: 31, 24: 41, 32: 51, 64: 92, 128: 176}
"""Milliseconds of a step by tokens, 135M parameters in float32 on two cores: neither convex nor monotone."""


def cpu(tokens: float) -> float:
    return 3.0 + float(np.interp(tokens, list(MEASURED), list(MEASURED.values())))


def steep(tokens: float) -> float:
    return 2.0 + tokens


def flat(tokens: float) -> float:
    return 20.0 + 0.01 * tokens


def table_of(
    cost: Callable[[float], float], draft_ms: float = 0.0, drafts: tuple[int, ...] = (0, 1, 2, 3, 4, 5, 6, 7)
) -> CostTable:
    """A table over rows 1 … 16; drafting costs `draft_ms` a token and step."""
    grid = CostGrid((1, 2, 3, 4, 8, 16), drafts, (128, 2048))
    verify = [[[cost(r * (1 + k))] * 2 for k in grid.drafts] for r in grid.rows]
    return CostTable(grid, np.array(verify), np.array([[draft_ms * k for k in grid.drafts] for _ in grid.rows]))


def survival(p: float, k: int = 7) -> list[float]:
    return [p ** (position + 1) for position in range(k)]


# --- uniform ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("p", [0.0, 0.1, 0.3, 0.5, 0.7, 0.9, 1.0])
@pytest.mark.parametrize("rows", [1, 4, 16])
@pytest.mark.parametrize("cost", [cpu, steep, flat])
def test_uniform_takes_the_best_tier(cost: Callable[[float], float], rows: int, p: float) -> None:
    tiers = (1, 2, 4, 7)

    def rate(k: int) -> float:
        return rows * (1 + sum(survival(p, k))) / (cost(rows * (1 + k)) + 0.5 * k)

    chosen = choose_uniform(table_of(cost, 0.5), [survival(p)] * rows, CONTEXT, tiers, hysteresis=0.0)
    assert chosen in {0, *tiers}
    assert rate(chosen) == pytest.approx(max(rate(k) for k in (0, *tiers)))


def test_uniform_is_zero_without_rows_or_tiers_or_drafts() -> None:
    table = table_of(flat)
    assert choose_uniform(table, [], CONTEXT, (1, 2)) == 0
    assert choose_uniform(table, [survival(0.9)], CONTEXT, ()) == 0
    assert choose_uniform(table, [[]], CONTEXT, (1, 2), previous_k=2) == 0


def test_an_expensive_drafter_is_not_run() -> None:
    assert choose_uniform(table_of(flat, draft_ms=0.0), [survival(0.5)], CONTEXT, (1, 2)) == 2
    assert choose_uniform(table_of(flat, draft_ms=15.0), [survival(0.5)], CONTEXT, (1, 2)) == 0


def test_hysteresis_keeps_k_still_at_the_threshold_in_both_directions() -> None:
    # steep, one row: k = 1 pays from p = 1/3 on, and the estimate wavers by one percent around it.
    table, rng = table_of(steep), random.Random(0)

    def num_changes(hysteresis: float) -> int:
        previous, changes = 0, 0
        for _ in range(500):
            wavering = survival(1 / 3 + rng.uniform(-0.01, 0.01), 1)
            k = choose_uniform(table, [wavering], CONTEXT, (1,), previous, hysteresis)
            changes += k != previous
            previous = k
        return changes

    assert num_changes(0.03) <= 1
    assert num_changes(0.0) > 50  # it thrashes: the scenario is a threshold


def test_prefills_are_not_counted() -> None:
    # One decoding row beside any number of prefilling ones is a batch of one: callers pass verify rows only,
    # and k depends on nothing else.
    table = table_of(cpu)
    assert choose_uniform(table, [survival(0.6)], CONTEXT, (2, 5)) == 5
    assert choose_uniform(table, [survival(0.6)] + [[]] * 15, CONTEXT, (2, 5)) == 0


# --- ragged ----------------------------------------------------------------------------------------------------------


def best_by_brute_force(cost: CostTable, survivals: list[list[float]]) -> float:
    rows = len(survivals)
    best = 0.0
    for counts in product(*(range(len(row) + 1) for row in survivals)):
        emitted = rows + sum(sum(row[:count]) for row, count in zip(survivals, counts, strict=True))
        best = max(best, emitted / cost.verify_ms(rows, rows + sum(counts), CONTEXT))
    return best


@pytest.mark.parametrize("cost", [cpu, steep, flat])
@pytest.mark.parametrize("seed", range(8))
def test_ragged_equals_brute_force(cost: Callable[[float], float], seed: int) -> None:
    rng = random.Random(seed)
    table = table_of(cost)
    lengths = [rng.randrange(5) for _ in range(rng.randrange(1, 5))]
    survivals = [np.cumprod([rng.random() for _ in range(length)]).tolist() for length in lengths]
    counts = choose_ragged(table, survivals, CONTEXT, min_gain=0.0)
    rows = len(survivals)
    emitted = rows + sum(sum(row[:count]) for row, count in zip(survivals, counts, strict=True))
    rate = emitted / table.verify_ms(rows, rows + sum(counts), CONTEXT)
    assert all(count <= len(row) for row, count in zip(survivals, counts, strict=True))
    assert rate == pytest.approx(best_by_brute_force(table, survivals))


def test_ragged_looks_past_a_bump_in_the_cost() -> None:
    assert choose_ragged(table_of(cpu), [[0.05, 0.01, 0.0]], CONTEXT) == [2]


def test_drafts_go_to_the_rows_that_accept_them() -> None:
    counts = choose_ragged(table_of(steep), [survival(0.1), survival(0.97), [], survival(0.97, 2)], CONTEXT)
    assert counts[0] == counts[2] == 0
    assert counts[1] > counts[3] == 2


def test_equal_survivals_stay_prefixes() -> None:
    assert choose_ragged(table_of(flat), [[1.0] * 7, [1.0] * 3], CONTEXT) == [7, 3]
    assert choose_ragged(table_of(flat), [], CONTEXT) == []


# --- probes ----------------------------------------------------------------------------------------------------------


def probe_steps(table: CostTable, rows: int, num_steps: int) -> tuple[list[int], PolicyState]:
    state, steps = PolicyState(), []
    for step in range(num_steps):
        counts, state = plan_ragged(state, table, ["bad"] * rows, [[0.01, 0.001]] * rows, CONTEXT)
        if sum(counts):
            steps.append(step)
            assert sum(counts) <= 2
    return steps, state


def test_a_class_trimmed_to_nothing_is_probed_with_backoff_and_below_one_percent() -> None:
    table = table_of(steep)
    steps, state = probe_steps(table, 4, 4000)
    gaps = [b - a for a, b in pairwise(steps)]
    assert steps[0] < 4
    assert gaps[0] < gaps[-1]
    assert max(gaps) <= 64
    cost = len(steps) * (steep(5) - steep(4))
    assert cost < 0.01 * (4000 * steep(4)) + 2 * steep(4)
    assert state.credit >= 0.0


def test_probes_that_cost_much_are_rarer() -> None:
    cheap, _ = probe_steps(table_of(steep), 4, 2000)
    dear, _ = probe_steps(table_of(lambda tokens: 2.0 + 2.0 * max(0.0, tokens - 4)), 4, 2000)
    assert 1 <= len(dear) < len(cheap)


def test_an_accepted_probe_brings_the_next_one_soon_and_a_used_class_is_not_probed() -> None:
    table = table_of(steep)
    _, state = probe_steps(table, 1, 500)
    state = replace(state, credit=4.0)
    assert record(state, "bad", 0) is state
    assert record(state, "other", 1) is state
    state = record(state, "bad", 1)
    counts, state = plan_ragged(state, table, ["bad"], [[0.01]], CONTEXT)
    assert counts == [1]
    counts, state = plan_ragged(state, table, ["bad"], [[0.9]], CONTEXT)
    assert counts == [1]
    assert set(state.probes) == {"plain"}


def test_rows_without_drafts_and_empty_steps_are_not_probed() -> None:
    state = PolicyState()
    for _ in range(50):
        counts, state = plan_ragged(state, table_of(steep), ["none"], [[]], CONTEXT)
        assert counts == [0]
    assert state.probes == {}
    assert plan_ragged(state, table_of(steep), [], [], CONTEXT) == ([], state)


def test_uniform_probes_come_back_from_zero() -> None:
    table, state = table_of(steep), PolicyState(previous_k=3)
    chosen = []
    for _ in range(300):
        k, state = plan_uniform(state, table, [survival(0.05)] * 4, CONTEXT, (1, 3))
        chosen.append(k)
        assert state.previous_k == 0
    assert set(chosen) == {0, 1}
    assert chosen.count(1) <= 12
    state = record(replace(state, credit=4.0), None, 1)
    assert plan_uniform(state, table, [survival(0.05)] * 4, CONTEXT, (1, 3))[0] == 1
    k, state = plan_uniform(state, table_of(flat), [survival(0.9)] * 4, CONTEXT, (1, 3))
    assert (k, state.previous_k, set(state.probes) - {"price"}) == (3, 3, {"plain"})


@pytest.mark.parametrize("cost", [flat, cpu, steep])
def test_uniform_says_when_it_will_probe(cost: Callable[[float], float]) -> None:
    """To the step, where the loss does not change; nothing while it drafts, and never for what no credit pays for."""
    table, state, said = table_of(cost, 1.0), PolicyState(), 0
    for step in range(1500):
        k, state = plan_uniform(state, table, [survival(0.01)] * 4, CONTEXT, (1, 3))
        assert state.previous_k == 0
        if said > 0:
            assert (k > 0) == (said == 1), step
        assert state.probe_in == said - 1 or said <= 1, "it counts down"
        said = state.probe_in
        assert said >= 1
    dear = table_of(lambda tokens: 1.0 + 10 * max(0.0, tokens - 4))
    assert plan_uniform(state, dear, [survival(0.01)] * 4, CONTEXT, (1, 3))[1].probe_in > 10**6
    k, state = plan_uniform(state, table_of(flat), [survival(0.9)] * 4, CONTEXT, (1, 3))
    assert k > 0 and state.probe_in == 0


def test_what_a_choice_promises() -> None:
    """Tokens over time, beside one token a step; nothing where it does not draft."""
    state = plan_uniform(PolicyState(), table_of(steep), [survival(0.9)] * 2, CONTEXT, (3,))[1]
    assert state.previous_k == 3
    assert state.speedup == pytest.approx((1 + sum(survival(0.9, 3))) * steep(2) / steep(8))
    assert plan_uniform(state, table_of(steep, 9.0), [survival(0.1)], CONTEXT, (3,))[1].speedup == 1.0
    counts, state = plan_ragged(PolicyState(), table_of(flat), ["a", "b"], [survival(0.9, 2), []], CONTEXT)
    assert counts == [2, 0]
    assert state.speedup == pytest.approx((2 + 0.9 + 0.81) / 2 * flat(2) / flat(4))
    assert plan_ragged(state, table_of(steep), ["a"], [[0.01]], CONTEXT)[1].speedup == 1.0
    told = best_draft(table_of(steep, 1.0), survival(0.5), 2, CONTEXT, (0, 1, 3))
    assert told == "at best k = 1: 1.50 tokens a step in 1.75 times the time, batch 2"


def test_what_catching_up_costs_is_paid_by_the_probes_to_come() -> None:
    state = charge(PolicyState(credit=1.0), 3.0)
    assert state.credit == -2.0
    assert charge(state, -5.0) == state, "a step that was faster gives nothing"
    assert charge(state, 1e9).credit == -64.0
    steps = 0
    while (k := plan_uniform(state, table_of(flat), [survival(0.001)], CONTEXT, (1,)))[0] == 0:
        state, steps = k[1], steps + 1
    assert steps >= 2.0 / 0.008


def test_an_accepted_probe_is_followed_by_another_at_once() -> None:
    state = PolicyState(probes={"all rows": Probe(wait=60, interval=64)}, probe_in=60)
    assert record(state, None, 0).probe_in == 60
    assert record(state, None, 1).probe_in == 1


def test_uniform_without_tiers_or_rows_never_probes() -> None:
    state = PolicyState(probes={"all rows": Probe(wait=0)})
    assert plan_uniform(state, table_of(flat), [survival(0.9)], CONTEXT, ()) == (0, state)
    assert plan_uniform(state, table_of(flat), [], CONTEXT, (1,)) == (0, state)


# --- simulation ------------------------------------------------------------------------------------------------------

Mixture = Callable[[int], dict[str, float | None]]
"""Step -> acceptance of each class a row may draw; None: the drafter finds nothing."""


def accepted(rng: random.Random, p: float | None, num_drafts: int) -> int:
    count = 0
    while p is not None and count < num_drafts and rng.random() < p:
        count += 1
    return count


def throughput(
    cost: Callable[[float], float], mixture: Mixture, rows: int, fixed: int | None, table: CostTable | None = None
) -> float:
    """Emitted tokens per millisecond over 1,200 steps, of the policy or of a fixed k."""
    rng = random.Random(rows)
    noise = random.Random(7)
    tracker, state, num_emitted, ms = AcceptanceTracker(), PolicyState(), 0, 0.0
    table = table or table_of(cost)
    for step in range(1200):
        kinds = mixture(step)
        classes = [rng.choice(list(kinds)) for _ in range(rows)]
        if fixed is None:
            survivals = [[] if kinds[name] is None else tracker.survival(name, 7) for name in classes]
            counts, state = plan_ragged(state, table, classes, survivals, CONTEXT)
        else:
            counts = [0 if kinds[name] is None else fixed for name in classes]
        step_ms = cost(rows + sum(counts))
        for name, count in zip(classes, counts, strict=True):
            num_accepted = accepted(rng, kinds[name], count)
            num_emitted += 1 + num_accepted
            if fixed is None and count:
                tracker.update(name, count, num_accepted)
                state = record(state, name, num_accepted)
        ms += step_ms
        if fixed is None:
            table.observe(rows, rows + sum(counts), CONTEXT, step_ms * noise.lognormvariate(0.0, 0.04))
    return num_emitted / ms


MIXTURES: dict[str, Mixture] = {
    "rare": lambda step: {"a": 0.05},
    "some": lambda step: {"a": 0.3},
    "half": lambda step: {"a": 0.6},
    "most": lambda step: {"a": 0.95},
    "mixed": lambda step: {"a": 0.05, "b": 0.5, "c": 0.95, "n": None},
    "drift": lambda step: {"a": 0.05 if step // 300 % 2 else 0.9},
}


@pytest.mark.parametrize("mixture", MIXTURES)
@pytest.mark.parametrize(
    ("cost", "rows"), [(cpu, 1), (cpu, 4), (cpu, 16), (steep, 1), (steep, 4), (steep, 16), (flat, 4)]
)
def test_the_policy_is_never_slower_and_near_the_best_fixed_k(
    cost: Callable[[float], float], rows: int, mixture: str
) -> None:
    policy = throughput(cost, MIXTURES[mixture], rows, None)
    fixed = {k: throughput(cost, MIXTURES[mixture], rows, k) for k in (0, 1, 2, 5, 7)}
    assert policy >= 0.98 * fixed[0]
    assert policy >= 0.95 * max(fixed.values())


@pytest.mark.parametrize("mixture", ["rare", "half", "mixed"])
def test_a_table_that_lies_is_found_out(mixture: str) -> None:
    # Measured while another process had the cores: plain decoding looks six times as dear as it is, drafts look free.
    lying = table_of(lambda tokens: 40.0 + 0.01 * tokens)
    policy = throughput(steep, MIXTURES[mixture], 4, None, lying)
    assert policy >= 0.9 * throughput(steep, MIXTURES[mixture], 4, 0)
