"""Log-probabilities are torch's, and the best tokens are in the order of the logits."""

from __future__ import annotations

import pytest
import torch

from server.kernels.logprobs import MAX_TOP, SCORE_BLOCK, score_tokens, score_tokens_reference
from server.sampling.logprobs import score
from tests.kernels.conftest import ON_GPU

VOCABS = [64, 49_152, 128_256, 50_257] if ON_GPU else [1, 15, SCORE_BLOCK, 3 * SCORE_BLOCK + 1]


@pytest.mark.parametrize("num_top", [0, 3, 20, 32])
@pytest.mark.parametrize("vocab_size", VOCABS)
def test_equals_reference(device: torch.device, dtype: torch.dtype, vocab_size: int, num_top: int) -> None:
    """In 16 bits many logits are equal: the lowest ids come first."""
    logits = (torch.randn(5, vocab_size, device=device) * 4).to(dtype)
    logits[1].round_()
    logits[2] = 1.5
    logits[3, vocab_size // 2 :] = -torch.inf
    logits[3, 0] = 40.0
    tokens = torch.randint(vocab_size, (5,), device=device)
    tokens[3] = 0
    chosen, ids, values = score_tokens(logits, tokens, num_top)
    wanted, wanted_ids, wanted_values = score_tokens_reference(logits, tokens, num_top)
    torch.testing.assert_close(chosen, wanted, rtol=1e-5, atol=2e-6)
    torch.testing.assert_close(values, wanted_values, rtol=1e-5, atol=2e-6)
    by_logit = logits.float().sort(dim=-1, descending=True, stable=True).indices[:, :num_top]
    assert torch.equal(ids, by_logit)
    assert ids.shape == wanted_ids.shape == (5, min(num_top, vocab_size))


def test_as_for_clients(device: torch.device) -> None:
    logits = torch.randn(4, 300, device=device)
    tokens = torch.randint(300, (4,), device=device)
    chosen, ids, values = score_tokens(logits, tokens, 20)
    found = score(logits, tokens, 20)
    assert torch.equal(ids, found.top_ids)
    torch.testing.assert_close(chosen, found.chosen, rtol=1e-5, atol=2e-6)
    torch.testing.assert_close(values, found.top_logprobs, rtol=1e-5, atol=2e-6)


@pytest.mark.parametrize("bad", [torch.nan, torch.inf, -torch.inf])
def test_broken_positions_name_tokens_and_spoil_no_other(device: torch.device, bad: float) -> None:
    logits = torch.randn(3, 150, device=device)
    tokens = torch.tensor([3, 2**40, 5], device=device)  # undefined where it was not emitted
    wanted = [part[2] for part in score_tokens(logits, tokens, 7)]
    logits[1] = bad
    chosen, ids, values = score_tokens(logits, tokens, 7)
    assert ((ids >= 0) & (ids < 150)).all()
    for found, expected in zip((chosen, ids, values), wanted, strict=True):
        assert torch.equal(found[2], expected)


def test_strided_rows(device: torch.device, dtype: torch.dtype) -> None:
    wide = torch.full((4, 100), torch.nan, dtype=dtype, device=device)
    wide[:, :70] = torch.randn(4, 70, device=device)
    tokens = torch.randint(70, (4,), device=device)
    for found, expected in zip(
        score_tokens(wide[:, :70], tokens, 9), score_tokens(wide[:, :70].contiguous(), tokens, 9), strict=True
    ):
        assert torch.equal(found, expected)


def test_what_does_not_fit(device: torch.device) -> None:
    logits, tokens = torch.randn(4, 70, device=device), torch.zeros(4, dtype=torch.int64, device=device)
    with pytest.raises(ValueError, match="num_top"):
        score_tokens(logits, tokens, MAX_TOP + 1)
    with pytest.raises(ValueError, match="logits"):
        score_tokens(logits.t(), tokens, 3)
