"""The emitted stream has exactly the distribution of plain sampling, for both rules and hostile drafters."""

from __future__ import annotations

import functools
from dataclasses import replace

import numpy as np
import pytest
import torch

from server.core import SamplingParams
from server.spec.verify import verify
from tests.distribution.markov import Case, joint, p_value, simulate

TRIALS = 200_000
ALPHA = 1e-4  # seeds are fixed: a failure is a change, not bad luck

PLAIN = SamplingParams()
VARIANTS = {
    "temperature": SamplingParams(temperature=0.7),
    "hot": SamplingParams(temperature=1.6),
    "top_k": SamplingParams(top_k=3),
    "top_p": SamplingParams(temperature=1.2, top_p=0.8),
    "min_p": SamplingParams(min_p=0.15),
    "all_filters": SamplingParams(temperature=1.4, top_k=5, top_p=0.9, min_p=0.05),
    "presence_frequency": SamplingParams(presence_penalty=0.8, frequency_penalty=0.5),
    "repetition_top_p": SamplingParams(repetition_penalty=1.6, top_p=0.9),
    "bias": SamplingParams(logit_bias={0: 1.5, 3: -2.0, 5: -100.0}),
}
DRAFTERS = ("good", "wrong", "shifted", "point", "avoids", "mixed")

exact = functools.cache(lambda name: joint(VARIANTS.get(name, PLAIN)))


@pytest.mark.parametrize("drafter", DRAFTERS)
def test_ratio_is_exact(drafter: str) -> None:
    tokens = simulate(Case("ratio", drafter, PLAIN), TRIALS)
    assert p_value(tokens, exact("plain")) > ALPHA


@pytest.mark.parametrize("drafter", ["good", "avoids"])
def test_coupled_is_exact(drafter: str) -> None:
    tokens = simulate(Case("coupled", drafter, PLAIN), TRIALS)
    assert p_value(tokens, exact("plain")) > ALPHA


@pytest.mark.parametrize("rule", ["coupled", "ratio"])
@pytest.mark.parametrize("variant", VARIANTS)
def test_exact_with_every_sampling_parameter(rule: str, variant: str) -> None:
    tokens = simulate(Case(rule, "good", VARIANTS[variant], k=2, masked=rule == "ratio"), TRIALS)
    assert p_value(tokens, exact(variant)) > ALPHA


def test_a_drawn_draft_is_also_exact_as_a_point_mass() -> None:
    """Given the draft, whatever drew it, point-mass verification is exact: losing q costs acceptance only."""

    def forget_q(processed, layout, drafts, *rest):  # type: ignore[no-untyped-def]
        return verify(processed, layout, replace(drafts, probs=None), *rest)

    tokens = simulate(Case("ratio", "wrong", PLAIN), TRIALS // 2, forget_q)
    assert p_value(tokens, exact("plain")) > ALPHA


@pytest.mark.slow
@pytest.mark.parametrize("k", [0, 1, 3, 5])
@pytest.mark.parametrize("drafter", DRAFTERS)
@pytest.mark.parametrize("rule", ["coupled", "ratio"])
@pytest.mark.parametrize("variant", ["plain", *VARIANTS])
def test_exact_in_every_combination(rule: str, drafter: str, variant: str, k: int) -> None:
    tokens = simulate(Case(rule, drafter, VARIANTS.get(variant, PLAIN), k=k, masked=k == 5), TRIALS)
    assert p_value(tokens, exact(variant)) > 1e-6


@pytest.mark.parametrize("variant", ["plain", "all_filters", "repetition_top_p", "bias"])
def test_coupled_stream_is_the_same_for_every_drafter_and_length(variant: str) -> None:
    params = VARIANTS.get(variant, PLAIN)
    plain = simulate(Case("coupled", "good", params, k=0), 5_000)
    for drafter in DRAFTERS:
        for k in (1, 2, 4):
            assert np.array_equal(plain, simulate(Case("coupled", drafter, params, k=k, masked=k == 4), 5_000))


@pytest.mark.parametrize("rule", ["coupled", "ratio"])
def test_greedy_stream_is_the_argmax_stream(rule: str) -> None:
    params = SamplingParams(temperature=0.0, presence_penalty=0.8)
    sequence = np.unravel_index(joint(params).argmax(), joint(params).shape)
    for drafter in DRAFTERS:
        assert (simulate(Case(rule, drafter, params, k=3), 4) == np.array(sequence)).all()


def test_trials_see_acceptance_rejection_and_bonus() -> None:
    """The positions under test are reached by all three ways, else the tests above prove less than they say."""
    seen: list[torch.Tensor] = []

    def spy(*args):  # type: ignore[no-untyped-def]
        seen.append(verify(*args).num_accepted)
        return verify(*args)

    for drafter, least in (("good", 0.1), ("mixed", 0.05)):
        seen.clear()
        simulate(Case("ratio", drafter, PLAIN), 2_000, spy)
        share = torch.bincount(torch.cat(seen), minlength=3) / torch.cat(seen).numel()
        assert share.min() > least
