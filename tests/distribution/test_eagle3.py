"""An engine that drafts with an EAGLE-3 head says what plain sampling says, in distribution, under either rule."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from scipy import stats

from draft_models.eagle3_config import config_for
from draft_models.eagle3_cpu_network import Eagle3CpuNetwork
from server.core import SamplingParams
from server.models.paging import Span, make_pools, ragged_batch
from tests.engine.eagle3_head import MAX_POSITIONS, deep_target, learned_head
from tests.engine.tiny import BLOCK_SIZE, VOCAB_SIZE, engine, prompts, request, run

PROMPT = prompts(16)[3]
TRIALS = 4_000
TOP_K = 3
LENGTH = 4
ALPHA = 1e-4  # seeds are fixed: a failure is a change, not bad luck
PARAMS: dict[str, Any] = {"temperature": 4.0, "top_k": TOP_K}


@pytest.fixture(scope="module")
def target(tmp_path_factory: pytest.TempPathFactory) -> Any:
    return deep_target(tmp_path_factory.mktemp("deep"))


@pytest.fixture(scope="module")
def head(target: Any) -> Eagle3CpuNetwork:
    """Right often enough, and often wrong."""
    config = config_for(target.config, VOCAB_SIZE)
    return Eagle3CpuNetwork(config, learned_head(target), target.embedding, MAX_POSITIONS)


@pytest.fixture(autouse=True)
def _no_grad() -> Iterator[None]:
    with torch.inference_mode():
        yield


def next_probs(target: Any, tokens: list[int]) -> dict[int, float]:
    """Of the TOP_K tokens that may follow, from the logits by definition."""
    pools = make_pools(target.kv_layers, 16 * BLOCK_SIZE, target.dtype, target.device)
    batch = ragged_batch([Span(0, len(tokens), list(range(1, 12)), True)], BLOCK_SIZE)
    logits, _ = target.forward(torch.tensor(tokens), pools, batch, torch.tensor([len(tokens) - 1]))
    best = logits[0].double().topk(TOP_K)
    probs = (best.values / PARAMS["temperature"]).softmax(-1)
    return dict(zip(best.indices.tolist(), probs.tolist(), strict=True))


def joint(target: Any) -> dict[tuple[int, ...], float]:
    """Probability of every answer of LENGTH tokens."""
    found: dict[tuple[int, ...], float] = {(): 1.0}
    for _ in range(LENGTH):
        found = {
            (*answer, token): p * q
            for answer, p in found.items()
            for token, q in next_probs(target, [*PROMPT, *answer]).items()
        }
    return found


def p_value(answers: list[tuple[int, ...]], exact: dict[tuple[int, ...], float]) -> float:
    """Chi-square of the whole answers, cells with few expected ones together."""
    assert set(answers) <= set(exact), "a token that the filter forbids"
    expected: NDArray[Any] = np.array(list(exact.values())) * len(answers)
    counts: NDArray[Any] = np.array([answers.count(answer) for answer in exact], float)
    rare = expected < 10.0
    if rare.any():
        expected = np.append(expected[~rare], expected[rare].sum())
        counts = np.append(counts[~rare], counts[rare].sum())
    statistic = ((counts - expected) ** 2 / np.maximum(expected, 1e-9)).sum()
    return float(stats.chi2.sf(statistic, len(expected) - 1))


@pytest.mark.parametrize(("rule", "k"), list(itertools.product(["coupled", "ratio"], [1, 2])))
def test_answers_have_the_targets_distribution(target: Any, head: Any, rule: str, k: int) -> None:
    core = engine(target, "eagle3", k, draft_model=head, rule=rule, max_num_seqs=64, num_blocks=800, budget=512)
    core.max_waiting = TRIALS
    asked = [request(f"r{i}", PROMPT, LENGTH, sampling=SamplingParams(seed=i, **PARAMS)) for i in range(TRIALS)]
    answers = run(core, asked)
    assert 0.1 < answers.num_accepted / answers.num_drafted < 0.9
    assert p_value([tuple(answers[req.request_id]) for req in asked], joint(target)) > ALPHA


def test_the_statistic_can_fail(target: Any) -> None:
    exact = joint(target)
    rng = np.random.default_rng(0)
    keys, probs = list(exact), np.array(list(exact.values()))
    right = rng.choice(len(keys), TRIALS, p=probs / probs.sum())
    flat = probs**0.8
    wrong = rng.choice(len(keys), TRIALS, p=flat / flat.sum())
    assert p_value([keys[i] for i in right], exact) > ALPHA
    assert p_value([keys[i] for i in wrong], exact) < ALPHA
