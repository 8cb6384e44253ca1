"""The rejection kernel decides as `server.spec.verify` does under the rule `ratio`."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from server.core import SamplingParams
from server.kernels.ratio import ratio_verify_by_slot
from server.sampling.process import process
from server.spec.types import SlotState
from server.spec.verify import verify
from tests.kernels.conftest import ON_GPU
from tests.kernels.sampling import Step, random_step

VOCABS = [64, 49_152, 128_256] if ON_GPU else [150]
NUM_ROWS = 64 if ON_GPU else 6
KINDS = {
    "plain": [SamplingParams(seed=i, temperature=0.7) for i in range(NUM_ROWS)],
    "mixed": [SamplingParams(temperature=float(i % 3 > 0), seed=i) for i in range(NUM_ROWS)],
    "filtered": [SamplingParams(seed=i, top_k=(0, 8)[i % 2], top_p=(1.0, 0.7, 1.0)[i % 3]) for i in range(NUM_ROWS)],
}


def expected(step: Step, probs: Tensor | None) -> tuple[Tensor, Tensor]:
    rows = torch.arange(step.drafts.shape[0], device=step.logits.device)
    state = SlotState(rows[:, None], rows, rows)
    drafts = step.as_drafts(probs)
    processed = process(step.logits.float(), step.layout, drafts, step.batch, state, rows, 1)
    verdict = verify(processed, step.layout, drafts, step.batch, step.num_tokens, "ratio")
    return verdict.tokens, verdict.num_accepted


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("vocab_size", VOCABS)
@pytest.mark.parametrize("has_probs", [True, False])
@pytest.mark.parametrize("width", [1, 4] if ON_GPU else [4])
def test_equals_reference(
    device: torch.device, dtype: torch.dtype, kind: str, vocab_size: int, has_probs: bool, width: int
) -> None:
    step = random_step(KINDS[kind], width, vocab_size, dtype, device, peak=4.0)
    probs = None
    if has_probs and width > 1:
        own = step.logits.float().view(NUM_ROWS, width, -1)[:, :-1]
        probs = (own + 0.3 * torch.randn_like(own)).softmax(-1)
        step.drafts = torch.multinomial(probs.view(-1, vocab_size), 1).view(NUM_ROWS, width - 1)
    tokens, num_accepted, broken = ratio_verify_by_slot(
        step.logits, step.drafts, step.num_valid, probs, *step.by_slot, kind == "filtered"
    )
    wanted, wanted_accepted = expected(step, probs)
    assert not broken.any()
    same = num_accepted == wanted_accepted
    assert same.float().mean() >= 0.95  # u * q < p may turn on the last place
    emitted = torch.arange(width, device=device) <= num_accepted[:, None]
    agree = ((tokens == wanted) | ~emitted).all(1)
    assert agree[same].float().mean() >= 0.95
    assert ((tokens >= 0) & (tokens < vocab_size)).all()
    if width > 1 and kind == "plain":
        assert (num_accepted < step.num_valid).any() and (num_accepted > 0).any()


def test_target_is_drawn_where_nothing_is_left(device: torch.device) -> None:
    """p equals q, yet the draft has no probability: the residual is empty."""
    step = random_step([SamplingParams(seed=1)] * 3, 2, 64, torch.float32, device)
    step.logits[:, 7] = -torch.inf
    step.drafts.fill_(7)
    step.num_valid.fill_(1)
    probs = step.logits.view(3, 2, 64)[:, :1].softmax(-1)
    what = (step.logits, step.drafts, step.num_valid)
    tokens, num_accepted, _ = ratio_verify_by_slot(*what, probs + 1e-7, *step.by_slot, False)
    assert num_accepted.tolist() == [0, 0, 0]
    assert torch.equal(tokens[:, :1], expected(step, probs + 1e-7)[0][:, :1])


def test_broken_and_forced(device: torch.device) -> None:
    step = random_step(KINDS["plain"][:4], 3, 64, torch.float32, device)
    step.num_valid.fill_(2)
    step.logits.view(4, 3, 64)[1, 1, 9] = torch.nan
    step.logits.view(4, 3, 64)[2, 2, 9] = torch.inf
    what = (step.logits, step.drafts, step.num_valid)
    tokens, num_accepted, broken = ratio_verify_by_slot(*what, None, *step.by_slot, False, 1)
    assert num_accepted.tolist() == [1] * 4
    assert broken.tolist() == [False, True, False, False]
    assert ((tokens >= 0) & (tokens < 64)).all()
