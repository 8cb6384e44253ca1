"""What a device drafter draws: the reference's token and q; and that drafting and verifying keep the distribution."""

from __future__ import annotations

import pytest
import torch
from scipy.stats import chisquare
from torch import Tensor

from server.core import SamplingParams
from server.kernels.ratio import ratio_verify_by_slot
from server.kernels.sample import draft_sample_by_slot
from server.kernels.verify import sampled_verify_by_slot
from server.sampling.distribution import Processed
from server.spec.verify import draft_token
from tests.kernels.conftest import ON_GPU
from tests.kernels.sampling import Step, random_step

C, V = (32_000, 128_256) if ON_GPU else (150, 400)
GREEDY = SamplingParams(temperature=0.0)
PARAMS = [
    SamplingParams(seed=1),
    GREEDY,
    SamplingParams(temperature=0.4, seed=5),
    SamplingParams(temperature=1e-5, seed=2),
]


def drawn(step: Step, rule: str, ids: Tensor | None, all_greedy: bool = False) -> tuple[Tensor, Tensor | None]:
    slots, floats, ints, _ = step.by_slot
    return draft_sample_by_slot(step.logits, slots, floats, ints, step.num_tokens, ids, rule, V, all_greedy=all_greedy)


def expected(step: Step, rule: str, ids: Tensor | None) -> tuple[Tensor, Tensor | None]:
    scaled = step.logits.float() / step.batch.temperature[:, None]
    return draft_token(Processed(scaled, V), step.batch, step.num_tokens, rule, ids)


@pytest.mark.parametrize("rule", ["coupled", "ratio"])
@pytest.mark.parametrize("mapped", [True, False])
def test_draws_the_references_token(device: torch.device, dtype: torch.dtype, rule: str, mapped: bool) -> None:
    step = random_step(PARAMS, 1, C if mapped else V, dtype, device)
    step.logits[1, 5] = step.logits[1, 9] = 40.0  # the lower *target* id wins
    ids = torch.randperm(V, device=device)[:C] if mapped else None
    tokens, q = drawn(step, rule, ids)
    wanted, wanted_q = expected(step, rule, ids)
    assert torch.equal(tokens[:3], wanted[:3])
    if rule == "coupled":
        assert q is None and wanted_q is None
    else:
        assert q is not None and wanted_q is not None
        torch.testing.assert_close(q, wanted_q, rtol=1e-5, atol=1e-7)
        assert q.shape == (4, V)


def test_all_greedy_is_argmax(device: torch.device, dtype: torch.dtype) -> None:
    step = random_step([GREEDY] * 4, 1, C, dtype, device)
    ids = torch.randperm(V, device=device)[:C]
    tokens, q = drawn(step, "ratio", ids, all_greedy=True)
    assert q is None and torch.equal(tokens, expected(step, "ratio", ids)[0])


NUM_ROWS, WORDS = (20_000, 6) if ON_GPU else (32, 3)
RULES = ["coupled", "ratio", "ratio of point masses"] if ON_GPU else ["coupled", "ratio"]


@pytest.mark.parametrize("filtered", [False, True] if ON_GPU else [False])
@pytest.mark.parametrize("rule", RULES)
def test_joint_distribution_is_the_targets(device: torch.device, rule: str, filtered: bool) -> None:
    """Pairs of neighbouring tokens over many seeds, with drafts from the production sampler of another distribution."""
    target, drafter = torch.randn(2, WORDS, device=device), torch.randn(1, WORDS, device=device)
    params = [SamplingParams(seed=i, temperature=0.8, top_k=WORDS - 1 if filtered else 0) for i in range(NUM_ROWS)]
    step = random_step(params, 2, WORDS, torch.float32, device)
    step.logits.copy_(target.repeat(NUM_ROWS, 1))
    step.num_valid.fill_(1)
    name, probs = rule.split()[0], None
    slots, floats, ints, known = step.by_slot
    tokens, q = draft_sample_by_slot(drafter.repeat(NUM_ROWS, 1), slots, floats, ints, step.num_tokens, None, name)
    step.drafts.copy_(tokens[:, None])
    if rule == "ratio":
        assert q is not None
        probs = q[:, None]
    if rule.endswith("masses"):
        step.drafts.fill_(int(target[0].argmax()))
    what = (step.logits, step.drafts, step.num_valid)
    if name == "coupled":
        emitted, accepted, _ = sampled_verify_by_slot(*what, slots, floats, ints, known, filtered)
    else:
        emitted, accepted, _ = ratio_verify_by_slot(*what, probs, slots, floats, ints, known, filtered)
    assert 0.1 < accepted.float().mean() < 0.95

    what = (step.logits[1::2].contiguous(), step.drafts[:, :0], accepted * 0)
    after, _, _ = sampled_verify_by_slot(*what, slots, floats, ints, known + 1, filtered)
    second = torch.where(accepted > 0, emitted[:, 1], after[:, 0])
    scaled = target / 0.8
    if filtered:
        scaled = scaled.masked_fill(scaled < scaled.topk(WORDS - 1, -1).values[:, -1:], -torch.inf)
    p = scaled.softmax(-1).double()
    joint = (p[0][:, None] * p[1]).flatten()
    counts = torch.bincount(emitted[:, 0] * WORDS + second, minlength=WORDS**2).double()
    possible = joint > 0
    assert counts[~possible].sum() == 0
    wanted = joint[possible] * NUM_ROWS
    assert chisquare(counts[possible].cpu(), (wanted * NUM_ROWS / wanted.sum()).cpu()).pvalue > 1e-3
