from __future__ import annotations

import math

import pytest

from optimize.evaluate.advice import advice
from optimize.evaluate.bounds import Estimate
from optimize.evaluate.drafter import Acceptance, Drafting
from optimize.evaluate.layers import LayerCost, Sensitivity
from optimize.evaluate.quality import Quality
from optimize.evaluate.speed import TierSpeed
from optimize.evaluate.verdict import Number, Verdict, judged
from optimize.recipe import GateThresholds, Recipe
from server.bench.report import Spread


def quality(ratio: float = 1.0, worst: float = 1.01, agreement: float = 0.99, broken: int = 0) -> Quality:
    return Quality(
        num_tokens=50_000,
        num_broken=broken,
        base_perplexity=20.0,
        candidate_perplexity=20.0 * ratio,
        perplexity_ratio=Estimate(ratio, 0.01, 2 * ratio - worst, worst, 79),
        divergence_mean=0.01,
        divergence_p99=0.1,
        top1_agreement=Estimate(agreement, 0.001, agreement - 0.002, agreement + 0.002, 79),
    )


def tier(batch: int, base: float, candidate: float) -> TierSpeed:
    ones = Spread(1.0, 1.0, 1.0)
    mine, theirs = (Spread(ms, ms * 0.9, ms * 1.1) for ms in (base, candidate))
    return TierSpeed(batch, "x", mine, theirs, Spread.of([candidate / base]), ones, ones)


def drafting(base: float, candidate: float) -> Drafting:
    return Drafting("head", 4, *(Acceptance(10, 40, rate, 1 + 4 * rate) for rate in (base, candidate)))


def failed(numbers: tuple[Number, ...]) -> list[str]:
    return [number.reason for number in Verdict(numbers).failed]


def test_all_well() -> None:
    thresholds = GateThresholds(faster_at=(1, 8))
    numbers = judged(quality(), [tier(1, 10, 9), tier(8, 10, 9.9)], drafting(0.5, 0.46), thresholds)
    verdict = Verdict(numbers)
    assert verdict.passed and verdict.reasons == []


def test_the_bound_decides_and_not_the_value() -> None:
    numbers = judged(quality(1.029, 1.0301), [], None, GateThresholds())
    assert failed(numbers) == ["perplexity ratio 1.029 (at worst 1.0301) is over 1.03"]
    assert failed(judged(quality(1.029, 1.03), [], None, GateThresholds())) == []
    numbers = judged(quality(agreement=0.951), [], None, GateThresholds())
    assert failed(numbers) == ["top-1 agreement 0.951 (at worst 0.949) is under 0.95"]


def test_every_number_can_say_no() -> None:
    assert failed(judged(quality(broken=1), [], None, GateThresholds())) == ["positions with broken logits 1 is over 0"]
    few = judged(quality(), [], None, GateThresholds(min_tokens=60_000))
    assert failed(few) == ["tokens of text 50,000 is under 60,000"]
    slow = judged(quality(), [tier(1, 10, 9), tier(8, 10, 10)], None, GateThresholds(faster_at=(1, 8)))
    assert failed(slow) == ["step time ratio at batch 8 1 is not under 1, 10 ms a step and 10 ms"]
    worse = judged(quality(), [], drafting(0.5, 0.44), GateThresholds())
    assert failed(worse) == ["acceptance ratio 0.88 is under 0.9, 0.440 of drafts accepted and 0.500"]
    assert failed(judged(quality(math.inf, math.inf), [], None, GateThresholds()))[0].startswith("perplexity ratio inf")


def test_what_was_not_measured_has_not_passed() -> None:
    names = failed(judged(None, [], None, GateThresholds(faster_at=(64,))))
    assert "perplexity ratio was not measured" in names
    assert "step time ratio at batch 64 was not measured" in names
    assert len(names) == 5
    assert not Number("x", math.nan, None, 1.0, "lower").passed


def test_only_claimed_tiers_must_be_faster() -> None:
    assert Verdict(judged(quality(), [tier(64, 10, 20)], None, GateThresholds(faster_at=()))).passed


def layers(*costs: float) -> Sensitivity:
    whole = tuple(LayerCost(f"model.layers.{i}", cost, True) for i, cost in enumerate(costs))
    part = LayerCost("model.layers.1.mlp.down_proj", max(costs), False)
    return Sensitivity(100, whole, (part, LayerCost("model.layers.0.mlp.down_proj", 0.001, False)), True)


def test_advice_names_what_failed_and_the_layers_that_stand_out() -> None:
    numbers = judged(quality(1.3, 1.32), [tier(8, 1, 2)], drafting(0.5, 0.1), GateThresholds(faster_at=(8,)))
    wrong = [number for number in numbers if not number.passed]
    gate = GateThresholds(faster_at=(1, 8))
    recipe = Recipe("x", method="awq", weights="int4", group_size=128, gate=gate)
    words = advice(wrong, recipe, layers(0.01, 0.5, 0.01), "head")
    assert "model.layers.1.mlp.down_proj (0.5 nats a token)" in words[0]
    assert "model.layers.0" not in words[0]
    assert "use smaller groups (group_size = 64, or 32)" in words
    assert any("faster_at = [1]" in line for line in words)
    assert words[-1] == "distil the drafter again on the candidate: outpace distill CANDIDATE --init head --out DIR"
    assert advice([], recipe, layers(0.1, 0.5), "head") == []
    assert not any("keep" in line for line in advice(wrong, recipe, layers(0.5, 0.5, 0.5), None)), "none stands out"


@pytest.mark.parametrize(
    ("recipe", "words"),
    [
        (Recipe("a", method="smoothquant", weights="int8", activations="int8"), "leave activations as they come"),
        (Recipe("a", weights="int8", activations="int8"), "use recipe int8-smoothquant"),
        (Recipe("a", weights="int8"), "scales of smaller groups"),
        (Recipe("a", method="auto"), "give the search more bits"),
        (
            Recipe("a", method="awq", weights="int4", activations="int8-group", group_size=32, minimum=True),
            "leave activations as they come",
        ),
        (None, "use a less aggressive recipe"),
    ],
)
def test_the_next_recipe(recipe: Recipe | None, words: str) -> None:
    wrong = [n for n in judged(quality(1.3, 1.32), [], None, GateThresholds()) if not n.passed]
    assert advice(wrong, recipe, None, None)[0].startswith(words)


def test_a_bound_alone_asks_for_more_text() -> None:
    wrong = [n for n in judged(quality(1.02, 1.04), [], None, GateThresholds()) if not n.passed]
    assert "judge by more text" in advice(wrong, None, None, None)[-1]
