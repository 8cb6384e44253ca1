from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch
from scipy import stats

from draft_models.eagle3_config import Eagle3Config
from draft_models.eagle3_weights import random_weights
from optimize.distill.evaluate import Acceptance, _walk, evaluate, noise_given, sample, table
from optimize.distill.head import Eagle3Head
from optimize.distill.packing import make_batch, pack
from optimize.distill.shards import ANSWER, TEMPLATE, Document
from optimize.distill.target import LlamaTeacher
from optimize.distill.ttt import Eagle3Student, unroll
from server.models.llama import LlamaModel
from server.sampling.rng import RESIDUAL, TARGET, gumbel, noise_keys
from tests.optimize.distill.conftest import MAX_POSITIONS, document

STEPS = 3


def test_noise_given_its_outcome_is_gumbel_noise() -> None:
    """Outcomes drawn from p, then noise given the outcome: together that is plain noise, and the outcome its argmax."""
    torch.manual_seed(0)
    n, v = 4000, 6
    logprobs = (2 * torch.randn(v)).log_softmax(-1).expand(n, v)
    outcome = torch.multinomial(logprobs.exp(), 1).squeeze(1)
    at = torch.arange(n)
    keys = (noise_keys(at, at * 0, at * 0, purpose) for purpose in (TARGET, RESIDUAL))
    noise = noise_given(logprobs, outcome, torch.arange(v), *keys)
    assert torch.equal((logprobs + noise).argmax(-1), outcome)
    for token in range(v):
        assert stats.kstest(noise[:, token].numpy(), "gumbel_r").pvalue > 1e-3
    assert abs(np.corrcoef(noise.T.numpy())[~np.eye(v, dtype=bool)]).max() < 0.06


def test_a_glance_is_at_all_of_the_text() -> None:
    """Not at how it begins, which may be its easiest part."""
    kinds = np.full(50, ANSWER, np.uint8)
    documents = [Document(np.full(50, i, np.int32), kinds, (0.0, 0.8)[i % 2]) for i in range(200)]
    found = [int(d.ids[0]) for d in sample(documents, 0.0, 1000)]
    assert len(found) == len(set(found)) == 20 and all(i % 2 == 0 for i in found)
    assert 60 < np.mean(found) < 140 and min(found) < 50 < 150 < max(found)
    assert found == [int(d.ids[0]) for d in sample(documents, 0.0, 1000)], "glances can be compared"
    assert len(sample(documents, 0.8, 10**9)) == 100 and len(sample(documents, 0.8, 1)) == 1
    assert sample(documents, 0.3, 1000) == []


def test_noise_at_a_part_of_the_vocabulary_is_the_same_noise() -> None:
    at = torch.arange(50)
    logprobs = torch.randn(50, 20).log_softmax(-1)
    outcome = torch.randint(0, 20, (50,))
    ids = torch.tensor([2, 3, 7, 19])
    keys = [noise_keys(at, at * 0, at, purpose) for purpose in (TARGET, RESIDUAL)]
    whole = noise_given(logprobs, outcome, torch.arange(20), *keys)
    torch.testing.assert_close(noise_given(logprobs, outcome, ids, *keys), whole[:, ids])
    assert gumbel(keys[0], 20).isfinite().all() and whole.isfinite().all()


def test_steps_walk_through_answers() -> None:
    kinds = np.array([TEMPLATE, TEMPLATE] + [ANSWER] * 7 + [TEMPLATE] + [ANSWER] * 2, np.uint8)
    packed = pack([Document(np.arange(12, dtype=np.int32), kinds, 0.0)], 16)
    agrees = np.zeros((2, 1, 16), bool)
    agrees[:, 0, 2] = True  # 3 tokens
    agrees[1, 0, 5] = True  # a later draft alone is worth nothing: 1 token
    agrees[:, 0, 6] = True  # 2 tokens are left
    assert _walk(packed, np.arange(1), agrees) == (6 + 1, 3 + 1)


@pytest.mark.parametrize("temperature", [0.0, 0.8])
def test_acceptance_is_counted_over_answers(temperature: float, model: LlamaModel, head_config: Eagle3Config) -> None:
    config = replace(head_config, draft_vocab_size=288)
    head = Eagle3Head(config, torch.arange(288), MAX_POSITIONS)
    head.load(random_weights(config, 0))
    teacher = LlamaTeacher(model, config.feature_layers)
    documents = [document(30, s, temperature) for s in range(1, 9)] + [document(30, 20, 0.5)]
    for d in documents[:-1]:
        for t in range(len(d.ids) - 1):
            batch = make_batch(pack([d], 32), np.arange(1), 1, torch.device("cpu"))
            features, normed = teacher.hidden(batch)
            if temperature:
                d.ids[t + 1] = int(drawn(teacher.logits(normed[0, t : t + 1]) / temperature))
                continue
            with torch.no_grad():  # the text is what the head drafts: then all is accepted at the first place
                out = next(iter(unroll(head, model.embedding, batch, features, 1)))
                d.ids[t + 1] = int(head.lm_head(head.norm(out[0, t])).argmax())
    result = evaluate(Eagle3Student(head, teacher, STEPS), documents, temperature, STEPS, 64)
    spans = sum(int((d.kinds >= ANSWER).sum()) - 1 for d in documents[:-1])
    assert result.num_tokens == spans, "all but the first token of an answer; only texts of this temperature"
    assert len(result.conditional) == STEPS
    np.testing.assert_allclose(result.survival, np.cumprod(result.conditional))
    if temperature == 0.0:
        assert result.conditional[0] == 1.0 and 2.0 <= result.emitted_per_step <= 1 + STEPS
    else:
        assert 0.0 <= result.conditional[0] < 0.6 and 1.0 <= result.emitted_per_step < 2.0


def test_a_drafter_that_knows_the_targets_distribution_is_always_right(model: LlamaModel) -> None:
    """Rule `coupled`: with the same logits and the same noise every draft is the text's token."""
    torch.manual_seed(0)
    logits = 3 * torch.randn(200, 288)
    at = torch.arange(200)
    outcome = drawn(logits / 0.8)
    keys = [noise_keys(at, at * 0, at, purpose) for purpose in (TARGET, RESIDUAL)]
    noise = noise_given((logits / 0.8).log_softmax(-1), outcome, torch.arange(288), *keys)
    assert torch.equal((logits / 0.8 + noise).argmax(-1), outcome)


def drawn(logits: torch.Tensor) -> torch.Tensor:
    return torch.multinomial(logits.softmax(-1), 1).squeeze(1)


def test_the_table() -> None:
    text = table([Acceptance(0.0, [0.5, 0.25], [0.5, 0.125], 1.6, 1234), Acceptance(0.8, [0.4], [0.4], 1.4, 9)])
    assert text.splitlines()[0] == "| held-out text | draft 1 | draft 2 | emitted per step | tokens |"
    assert text.splitlines()[2] == "| greedy | 0.500 | 0.250 | 1.60 | 1,234 |"
    assert "| temperature 0.8, coupled | 0.400 |" in text
