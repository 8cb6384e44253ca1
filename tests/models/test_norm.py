"""RMSNorm: the formula, and bits that do not depend on the number of rows."""

from __future__ import annotations

import pytest
import torch

from server.models.norm import RMSNorm


@pytest.mark.parametrize("size", [64, 576, 33])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_is_the_formula(size: int, dtype: torch.dtype) -> None:
    generator = torch.Generator().manual_seed(0)
    x, weight = torch.randn(5, 3, size, generator=generator).to(dtype), torch.rand(size, generator=generator).to(dtype)
    for scale in (0.0, 1e-3, 1.0, 1e3):
        wide = x.double() * scale
        expected = wide / (wide.square().mean(-1, keepdim=True) + 1e-5).sqrt() * weight.double()
        actual = RMSNorm(weight, 1e-5)((x * scale).to(dtype))
        assert actual.dtype == dtype
        tolerance = 1e-5 if dtype == torch.float32 else 3e-2
        torch.testing.assert_close(actual.double(), expected, atol=tolerance, rtol=tolerance)


@pytest.mark.parametrize("size", [64, 576, 100])
def test_a_rows_bits_depend_on_nothing_else(size: int) -> None:
    norm, x = RMSNorm(torch.rand(size), 1e-5), torch.randn(700, size)
    bits = norm(x)
    for rows in (1, 2, 3, 4, 7, 64, 513):
        assert torch.equal(norm(x[:rows]), bits[:rows])
        assert torch.equal(norm(x[-rows:].clone()), bits[-rows:])
