"""Copies against a chain: which of them, how many, and what is tried now and then."""

from __future__ import annotations

import numpy as np
import pytest

from server.spec.cost_table import CostGrid, CostTable
from server.spec.mixture import Choice, Mixture, joined, loss_of_copying, plan_chain, plan_mixture, take_copy
from server.spec.policy import PolicyState

TIERS = (1, 2, 4)
GOOD, POOR = [0.9, 0.8, 0.7, 0.6], [0.05, 0.01, 0.0, 0.0]
OFF = Choice(0, False)


def costs(token: float = 0.05, draft: float = 0.02) -> CostTable:
    """A step costs 1 ms, each draft token a row `token` more and a chain `draft` for each of its drafts."""
    drafts = np.array([0, 1, 2, 4])
    verify = np.tile((1.0 + token * drafts)[None, :, None], (2, 1, 1))
    return CostTable(CostGrid((1, 16), (0, 1, 2, 4), (16,)), verify, np.tile((draft * drafts)[None], (2, 1)))


def settled(cost: CostTable, mixture: Mixture, steps: int = 200) -> tuple[Choice, list[Choice]]:
    """The usual choice after many steps, and all of them."""
    state, seen = PolicyState(), []
    for _ in range(steps):
        choice, state = plan_mixture(state, cost, mixture, TIERS)
        seen.append(choice)
    return max(set(seen), key=seen.count), seen


def test_a_copy_that_ends_goes_on_as_the_chain() -> None:
    assert joined([0.9, 0.5], [0.8, 0.4, 0.2]) == pytest.approx([0.9, 0.5, 0.25])
    assert joined([], [0.8, 0.4]) == pytest.approx([0.8, 0.4])
    assert joined([0.9, 0.8, 0.7], [0.5]) == [0.9]
    assert joined([0.9], [0.0, 0.0]) == [0.9, 0.0]


def test_the_measure_is_expected_tokens() -> None:
    assert loss_of_copying(GOOD, GOOD) == 0.0
    assert loss_of_copying([1.0], [0.5, 0.5, 0.5]) == pytest.approx(1.0 - 2.0 / 2.5)
    assert loss_of_copying(GOOD, POOR) < 0.0 < loss_of_copying(POOR, GOOD)


def test_gain_counts_rows_that_copy_rows_that_do_not_and_rows_that_may_not() -> None:
    mixture = Mixture(5, 4, [([0.9, 0.8], 2), ([0.1, 0.0], 1)], [0.5, 0.25], 16.0)
    assert mixture.gain(2, True) == pytest.approx(2 * 1.7 + 0.75 + 0.75)
    assert mixture.gain(2, False) == pytest.approx(2 * 1.7 + 0.1)
    assert mixture.gain(1, True) == pytest.approx(2 * 0.9 + 0.5 + 0.5)
    assert mixture.gain(0, True) == 0.0


@pytest.mark.parametrize(
    ("copies", "learned", "expected"),
    [
        ([], GOOD, Choice(4, True)),
        ([], POOR, OFF),
        ([(GOOD, 1)], POOR, Choice(4, False)),
        ([(POOR, 1)], GOOD, Choice(4, True)),
        ([(POOR, 1)], POOR, OFF),
    ],
)
def test_it_takes_what_pays(copies: list[tuple[list[float], float]], learned: list[float], expected: Choice) -> None:
    usual, _ = settled(costs(), Mixture(1, 1, copies, learned, 16.0))
    assert usual == expected


def test_copying_goes_on_where_the_chain_is_too_dear() -> None:
    usual, _ = settled(costs(draft=2.0), Mixture(4, 4, [(GOOD, 1)], GOOD, 16.0))
    assert usual.k > 0 and not usual.chain


def test_what_is_advised_against_is_tried_now_and_then_and_seldom() -> None:
    for copies in ([], [(GOOD, 1)]):
        usual, seen = settled(costs(), Mixture(1, 1, copies, POOR, 16.0), 2000)
        chained = [choice for choice in seen if choice.chain]
        assert 10 < len(chained) < 200 and not usual.chain
    _, seen = settled(costs(), Mixture(1, 1, [], GOOD, 16.0), 2000)
    assert 5 < seen.count(OFF) < 100, "plain steps keep the cost table honest"
    _, seen = settled(costs(draft=1e6), Mixture(1, 1, [], GOOD, 16.0), 2000)
    assert set(seen) == {OFF}, "a probe that costs too much is never run"


def test_nothing_longer_is_taken_for_a_small_gain() -> None:
    mixture = Mixture(1, 1, [], [0.5, 0.0, 0.0, 0.0], 16.0)
    tight = costs(token=0.48, draft=0.01)  # 1.5 tokens for 1.49 ms: less than 1 % gained
    assert plan_mixture(PolicyState(credit=-9.0), tight, mixture, TIERS)[0] == OFF
    held = plan_mixture(PolicyState(1, credit=-9.0, previous_chain=True), tight, mixture, TIERS)[0]
    assert held == Choice(1, True)


def chain(cost: CostTable, copies: list[list[float]], learned: list[list[float]], steps: int = 1) -> list[int]:
    state, seen = PolicyState(credit=0.05 * steps), []
    for _ in range(steps):
        k, state = plan_chain(state, cost, copies, learned, 16.0, TIERS)
        seen.append(k)
    return seen


def test_the_chain_is_as_long_as_pays_for_the_rows_that_need_it() -> None:
    assert chain(costs(), [[]], [GOOD]) == [4]
    assert chain(costs(), [GOOD], [[]]) == [0], "all rows copy"
    assert chain(costs(), [GOOD, []], [[], GOOD]) == [4]
    assert chain(costs(), [[]], [GOOD[:2]]) == [2], "no longer than the longest row may be"
    assert chain(costs(draft=3.0), [[]], [GOOD]) == [0]


def test_a_chain_that_does_not_pay_is_tried_now_and_then() -> None:
    seen = chain(costs(), [[]], [POOR], 400)
    assert set(seen) == {0, 1} and 3 < seen.count(1) < 40
    assert set(chain(costs(draft=1e6), [[]], [POOR], 400)) == {0}


def test_a_worse_copy_is_taken_now_and_then_and_comes_back_at_once_when_it_is_better() -> None:
    state, taken = PolicyState(credit=3.0), []
    for _ in range(400):
        takes, state = take_copy(state, "prompt:2", POOR, GOOD)
        taken.append(takes)
    assert 3 < sum(taken) < 20 and state.credit < 3.0
    assert "copy prompt:2" in state.probes
    takes, after = take_copy(state, "prompt:2", GOOD, POOR)
    assert takes and "copy prompt:2" not in after.probes and after.credit == state.credit
    broke = PolicyState(credit=0.0)
    assert not any(take_copy(broke, "prompt:2", POOR, GOOD)[0] for _ in range(5))
