"""Seeded output and log-probabilities do not depend on drafts, on their number, on neighbours or on the layout."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch

from server.core import Request, SamplingParams
from tests.engine.tiny import Scripted, engine, prompts, request, run

LENGTH = 20
VARIANTS: dict[str, dict[str, Any]] = {
    "plain": {},
    "filters": {"top_p": 0.95, "top_k": 20, "min_p": 0.02},
    "penalties": {"top_p": 0.95, "repetition_penalty": 1.2, "presence_penalty": 0.6, "frequency_penalty": 0.4},
    "bias": {"top_p": 0.95, "logit_bias": {5: 4.0, 9: -100.0, 47: 2.5}},
    "everything": {
        "top_p": 0.95,
        "top_k": 30,
        "min_p": 0.01,
        "repetition_penalty": 1.1,
        "presence_penalty": 0.5,
        "frequency_penalty": 0.3,
        "logit_bias": {7: 3.0, 12: -5.0},
    },
}


def sampled(name: str, prompt: list[int], seed: int, variant: str, choice: int = 0, **fields: Any) -> Request:
    sampling = SamplingParams(temperature=0.8, seed=seed, **VARIANTS[variant])
    return request(name, prompt, LENGTH, sampling=sampling, choice=choice, **fields)


def crowd() -> list[Request]:
    """All variants side by side, greedy ones among them."""
    names = list(VARIANTS)
    batch = prompts(10, seed=1)
    mixed = [sampled(f"r{i}", p, 100 + i, names[i % len(names)]) for i, p in enumerate(batch)]
    return [*mixed, request("g", batch[0], LENGTH)]


@pytest.fixture(scope="module")
def alone(model: Any) -> dict[str, list[int]]:
    """Each request of the crowd by itself, without drafts."""
    answers: dict[str, list[int]] = {}
    for req in crowd():
        answers |= run(engine(model, max_num_seqs=1), [req])
    return answers


@pytest.mark.parametrize("ragged", [True, False])
@pytest.mark.parametrize("k", [1, 3, 7])
@pytest.mark.parametrize("drafter", ["none", "ngram", "suffix", "small-lm", "same-lm", "hybrid"])
def test_seeded_output_is_the_same_in_a_crowd_with_drafts(
    model: Any, other_model: Any, alone: dict[str, list[int]], drafter: str, k: int, ragged: bool
) -> None:
    name = "small-lm" if drafter == "same-lm" else drafter
    core = engine(
        model, name, k, draft_model=model if drafter == "same-lm" else other_model, ragged=ragged, prefix_cache=False
    )
    answers = run(core, crowd())
    assert dict(answers) == alone
    if drafter == "same-lm":
        assert answers.num_accepted == answers.num_drafted > 0, "the same model and noise draft what is emitted"


@pytest.mark.parametrize("ragged", [True, False])
def test_seeded_output_survives_chunks_preemption_and_order(
    model: Any, alone: dict[str, list[int]], ragged: bool
) -> None:
    core = engine(model, "suffix", 5, num_blocks=24, max_num_seqs=6, budget=5, ragged=ragged)
    answers = run(core, crowd()[::-1])
    assert core.stats().num_preemptions > 0
    assert dict(answers) == alone


def test_penalties_and_bias_do_something(model: Any) -> None:
    """Else their parity would be empty."""
    prompt = prompts(1)[0]
    answers = run(engine(model), [sampled(v, prompt, 1, v) for v in VARIANTS])
    assert len({tuple(tokens) for tokens in answers.values()}) == len(VARIANTS)


def test_the_same_seed_repeats_and_another_does_not(model: Any) -> None:
    prompt = prompts(1)[0]
    core = engine(model)
    seeds = {"a": 1, "b": 1, "c": 2, "d": -1, "e": 2**64 - 1, "f": 2**63}
    answers = run(core, [sampled(name, prompt, seed, "plain") for name, seed in seeds.items()])
    assert answers["a"] == answers["b"] != answers["c"]
    assert answers["d"] == answers["e"] != answers["f"], "a seed is 64 bits, signed or not"


def test_choices_of_one_request_differ(model: Any) -> None:
    prompt = prompts(1)[0]
    core = engine(model, "suffix", 3)
    answers = run(core, [sampled(f"c{i}", prompt, 5, "plain", choice=i) for i in range(4)])
    assert len({tuple(tokens) for tokens in answers.values()}) == 4


def test_the_rule_ratio_runs_and_repeats(model: Any, other_model: Any, greedy: Any) -> None:
    """Its sampled output depends on the drafts, its greedy output does not."""
    for drafter, draft_model in (
        ("suffix", None),
        ("small-lm", other_model),
        ("hybrid", other_model),
        ("small-lm", model),
    ):
        for ragged in (True, False):
            found = []
            for _ in range(2):
                core = engine(model, drafter, 3, draft_model=draft_model, rule="ratio", ragged=ragged)
                found.append(run(core, crowd()))
            assert dict(found[0]) == dict(found[1])
            assert found[0]["g"] == greedy(crowd()[-1].prompt_ids, LENGTH)
            assert found[0].num_accepted > 0
            if draft_model is model:
                assert found[0].num_accepted == found[0].num_drafted, "min(1, p/q) is 1 where p is q"


# -- log-probabilities -------------------------------------------------------------------------------------


def expected_logprobs(reference: Any, prompt: list[int], answer: list[int]) -> torch.Tensor:
    logits = reference(torch.tensor([[*prompt, *answer]])).logits[0, len(prompt) - 1 : -1]
    return torch.log_softmax(logits.double(), -1)


@pytest.mark.parametrize("ragged", [True, False])
@pytest.mark.parametrize("drafter", ["none", "suffix", "same-lm"])
def test_logprobs_are_the_targets_own(model: Any, reference: Any, drafter: str, ragged: bool) -> None:
    """Raw: before penalties, bias and temperature; of accepted drafts as of any other token."""
    batch = prompts(5, seed=1)
    settings = [{"temperature": 0.0}, {"temperature": 0.8, "seed": 4, **VARIANTS["everything"]}]
    requests = [
        request(f"r{i}", p, LENGTH, sampling=SamplingParams(logprobs=wanted, **settings[i % 2]))
        for i, (p, wanted) in enumerate(zip(batch, [0, 3, None, 5, 1], strict=True))
    ]
    name = "small-lm" if drafter == "same-lm" else drafter
    answers = run(engine(model, name, 3, draft_model=model, ragged=ragged), requests)
    if drafter != "none":
        assert answers.num_accepted > 0
    for req in requests:
        expected = expected_logprobs(reference, req.prompt_ids, answers[req.request_id])
        outputs = [o for o in answers.outputs if o.request_id == req.request_id]
        if req.sampling.logprobs is None:
            assert all(o.logprobs is None for o in outputs)
            continue
        found = [entry for o in outputs for entry in o.logprobs or []]
        assert [entry.token_id for entry in found] == answers[req.request_id]
        for entry, row in zip(found, expected, strict=True):
            assert math.isclose(entry.logprob, float(row[entry.token_id]), abs_tol=1e-4)
            best = row.topk(req.sampling.logprobs)
            assert entry.top_ids == best.indices.tolist()
            assert entry.top_logprobs == pytest.approx(best.values.tolist(), abs=1e-4)


def test_logprobs_stop_where_the_tokens_do(model: Any, greedy: Any) -> None:
    prompt = prompts(1)[0]
    answer = greedy(prompt, LENGTH)
    whole = [*prompt, *answer]
    drafter = Scripted(lambda tokens, k: whole[len(tokens) : len(tokens) + k])
    stop = answer[3]
    sampling = SamplingParams(temperature=0.0, logprobs=0)
    req = request("r", prompt, LENGTH, sampling=sampling, stop_token_ids=[stop])
    answers = run(engine(model, drafter, 7), [req])
    assert answers["r"] == answer[: answer.index(stop) + 1]
    for output in answers.outputs:
        assert output.logprobs is not None
        assert [entry.token_id for entry in output.logprobs] == output.token_ids
