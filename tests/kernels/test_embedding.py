from __future__ import annotations

import pytest
import torch

from server.kernels.embedding import (
    embed,
    embed_norm,
    embed_norm_reference,
    embed_reference,
    embed_scaled,
    embed_scaled_reference,
)
from tests.kernels.close import assert_close
from tests.kernels.conftest import ON_GPU

SHAPES = [(1, 10, 576), (7, 3, 1500), (0, 4, 8)] + (
    [(64, 128256, 4096), (5, 128256, 2048), (1111, 49152, 576)] if ON_GPU else []
)


@pytest.mark.parametrize(("tokens", "vocabulary", "width"), SHAPES)
def test_equals_reference(tokens: int, vocabulary: int, width: int, device: torch.device, dtype: torch.dtype) -> None:
    table = torch.randn(vocabulary, width, device=device, dtype=dtype)
    ids = torch.randint(vocabulary, (tokens,), device=device)
    if tokens > 1:
        ids[0], ids[1] = 0, vocabulary - 1
    assert torch.equal(embed(ids, table), embed_reference(ids, table))


@pytest.mark.parametrize(("tokens", "vocabulary", "width"), [s for s in SHAPES if s[0]])
def test_first_norm_is_prepared(
    tokens: int, vocabulary: int, width: int, device: torch.device, dtype: torch.dtype
) -> None:
    table, norm = torch.randn(vocabulary, width, device=device, dtype=dtype), torch.randn(width).to(device, dtype)
    ids = torch.randint(vocabulary, (tokens,), device=device)
    (x, scaled), (expected, reference) = embed_scaled(ids, table, norm), embed_scaled_reference(ids, table, norm)
    assert torch.equal(x, expected) and torch.equal(scaled.values, reference.values)
    torch.testing.assert_close(scaled.squares, reference.squares, rtol=1e-5, atol=0.0)


@pytest.mark.parametrize(("tokens", "vocabulary", "width"), [s for s in SHAPES if s[0]])
def test_both_norms_equal_reference(
    tokens: int, vocabulary: int, width: int, device: torch.device, dtype: torch.dtype
) -> None:
    table = torch.randn(vocabulary, width, device=device, dtype=dtype)
    ids = torch.randint(vocabulary, (tokens,), device=device)
    x = torch.full((tokens, 2 * width), torch.nan, device=device, dtype=dtype)[:, width:]
    x.normal_()
    norm, x_norm = torch.randn(2, width).to(device, dtype)
    args = (ids, table, norm, x, x_norm, 1e-5)
    assert_close(embed_norm(*args), embed_norm_reference(*args), dtype)


@pytest.mark.skipif(not ON_GPU, reason="a table past 2^31 elements")
def test_rows_past_two_to_the_31_elements(device: torch.device) -> None:
    table = torch.zeros(600_000, 4096, device=device, dtype=torch.bfloat16)
    table[599_999] = 7
    assert bool((embed(torch.tensor([599_999], device=device), table) == 7).all())
