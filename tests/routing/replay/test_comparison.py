"""Where two answers part, how far apart they are there, and what that means."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest

from server.core import Request, SamplingParams, TokenLogprobs
from server.routing.replay.book import NUM_KEPT, Book
from server.routing.replay.comparison import (
    ALARM,
    DIFFERENT,
    SAME,
    TIE,
    UNEXPLAINED,
    Answer,
    Comparison,
    Dropped,
    Scores,
    divergence,
    first_divergence,
    judged,
    token_at,
)
from server.routing.replay.sampling import chosen, reproducible, scored_by_model

IDS = [f"cmpl-{number}" for number in range(20_000)]


@pytest.mark.parametrize(
    ("answer", "copy", "position"),
    [
        ([1, 2, 3], [1, 2, 3], None),
        ([1, 2, 3], [9, 2, 3], 0),
        ([1, 2, 3], [1, 2, 4], 2),
        ([1, 2, 3], [1, 2], 2),
        ([1, 2], [1, 2, 3], 2),
        ([], [], None),
    ],
)
def test_the_first_token_that_differs(answer: list[int], copy: list[int], position: int | None) -> None:
    assert first_divergence(Answer(answer), Answer(copy)) == position


def test_of_an_answer_that_was_cut_off_only_what_there_is_counts() -> None:
    cut = Answer([1, 2], whole=False)
    assert first_divergence(cut, Answer([1, 2, 3])) is None
    assert first_divergence(cut, Answer([1])) == 1
    assert first_divergence(cut, Answer([1, 3])) == 1
    assert (token_at(cut, 1), token_at(cut, 2)) == (2, None)


def scores(**probabilities: float) -> Scores:
    ids = [int(name[1:]) for name in probabilities]
    return Scores.of(TokenLogprobs(0, 0.0, ids, [math.log(p) for p in probabilities.values()]))


def test_the_gap_is_that_of_the_worse_token_to_the_best() -> None:
    found = scores(t1=0.5, t2=0.25, t3=0.125)
    assert found.gap(1, 2) == pytest.approx(math.log(2))
    assert found.gap(2, 3) == pytest.approx(math.log(4)), "neither is the best: that is no tie of the two"
    assert found.gap(1, 7) == found.gap(1, None) == math.inf


def test_divergence_is_of_what_both_list_and_the_rest() -> None:
    p, q = scores(t1=0.5, t2=0.3, t3=0.1), scores(t1=0.25, t2=0.3, t4=0.2)
    wanted = 0.5 * math.log(2) + 0.3 * math.log(1) + 0.2 * math.log(0.2 / 0.45)
    assert divergence(p, q) == pytest.approx(wanted)
    assert divergence(p, p) == 0
    assert divergence(scores(t1=0.999), scores(t2=0.999)) > 6, "nothing is shared"


def test_a_lower_bound_of_the_true_divergence() -> None:
    p, q = [0.5, 0.3, 0.15, 0.05], [0.4, 0.3, 0.1, 0.2]
    true = sum(a * math.log(a / b) for a, b in zip(p, q, strict=True))
    listed = divergence(*(scores(**{f"t{i}": v[i] for i in range(3)}) for v in (p, q)))
    assert 0 < listed <= true + 1e-12


@pytest.mark.parametrize(
    ("promise", "apart", "scored", "verdict"),
    [
        ("none", 0.1, True, DIFFERENT),
        ("exact", 0.1, True, ALARM),
        ("close", 0.4, True, TIE),
        ("close", 0.6, True, ALARM),
        ("close", 0.6, False, UNEXPLAINED),
    ],
)
def test_what_a_difference_means(promise: str, apart: float, scored: bool, verdict: str) -> None:
    one = Scores({1: -1.0, 2: -1.0 - apart})
    assert judged(promise, (1, 2), [Scores({1: -1.0, 2: -1.0}), one], 0.5, scored=scored)[0] == verdict


def test_without_scores_nothing_is_explained_and_an_end_is_no_tie() -> None:
    assert judged("close", (1, 2), [], 0.5, scored=True)[0] == UNEXPLAINED
    assert judged("close", (1, None), [Scores({1: -1.0})], 0.5, scored=True)[0] == ALARM


@pytest.mark.parametrize("share", [0.0, 0.01, 0.3, 1.0])
def test_a_share_is_chosen_the_same_one_every_time(share: float) -> None:
    found = [chosen(name, share, "audit") for name in IDS]
    assert sum(found) / len(IDS) == pytest.approx(share, abs=0.01)
    assert found == [chosen(name, share, "audit") for name in IDS]
    if share == 0.3:
        both = sum(one and chosen(name, share, "shadow") for name, one in zip(IDS, found, strict=True))
        assert both / len(IDS) == pytest.approx(0.09, abs=0.01), "shadow and audit choose apart"


def test_a_larger_share_has_the_smaller_one() -> None:
    assert all(chosen(name, 0.2, "audit") for name in IDS if chosen(name, 0.1, "audit"))


def test_what_can_be_had_again() -> None:
    greedy, seeded = SamplingParams(temperature=0.0), SamplingParams(seed=7)
    assert reproducible(Request("r", [1], greedy), "ratio")
    assert reproducible(Request("r", [1], seeded), "coupled", "coupled")
    assert not reproducible(Request("r", [1], seeded), "coupled", "ratio")


def test_what_log_probabilities_explain() -> None:
    plain = Request("r", [1], SamplingParams(temperature=0.0))
    assert scored_by_model(plain)
    for sampling in ({"temperature": 1.0}, {"presence_penalty": 0.1}, {"logit_bias": {1: 2.0}}):
        assert not scored_by_model(replace(plain, sampling=replace(plain.sampling, **sampling)))
    assert not scored_by_model(replace(plain, min_tokens=2))


def found(verdict: str, number: int = 0, **fields: int | float | None) -> Comparison:
    return Comparison("audit", "control", "control", f"r{number}", 0.0, verdict, **fields)  # type: ignore[arg-type]


def test_the_book_counts_and_keeps_the_last_divergences() -> None:
    book = Book([("shadow", "control", "plain")])
    for number in range(NUM_KEPT + 5):
        book.take(found(ALARM, number, position=number, length_shift=-1, tpot_ratio=1.0))
    book.take(found(SAME, tpot_ratio=2.0))
    book.take(Dropped("audit", "control", "control", "busy"))
    report = book.report()
    shadow, audit = report["pairs"]
    assert (shadow["compared"], shadow["dropped"]) == (0, 0), "shown before anything happened"
    assert (audit["compared"], audit["diverged"], audit["alarms"], audit["dropped"]) == (106, 105, 105, 1)
    assert [one["position"] for one in report["data"]] == list(range(NUM_KEPT + 4, 4, -1))
    histograms = book.tallies["audit", "control", "control"].histograms
    assert sum(histograms["position"].counts) == 105 and histograms["position"].counts[0] == 1
    assert sum(histograms["tpot_ratio"].counts) == 106
