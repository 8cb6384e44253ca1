"""Quantised activations against formats.quantize_activations, bit for bit, with everything that may come before."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from server.kernels.quantize import (
    Precision,
    Quantized,
    Sums,
    add_norm_quantize_,
    norm_quantize,
    norm_quantize_reference,
    quantize,
    quantize_reference,
    silu_mul_quantize,
    silu_mul_quantize_reference,
    total_reference,
)
from server.quant.formats import quantize_activations
from tests.kernels.conftest import ON_GPU

EPS = 1e-5
PRECISIONS: list[Precision] = ["fp8", "int8"]
SHAPES = [(1, 16), (3, 70), (5, 128)] + ([(64, 4096), (7, 14336), (300, 576)] if ON_GPU else [])


def numbers(device: torch.device, dtype: torch.dtype, *shape: int) -> Tensor:
    return (torch.randn(*shape) * torch.rand(shape[0], *[1] * (len(shape) - 1)).exp()).to(device, dtype)


def same_bits(found: Quantized, q: Tensor, scales: Tensor) -> None:
    """The interpreter knows no negative zero."""
    assert found.scales is not None and found.values.dtype == q.dtype
    assert torch.equal(found.scales.cpu(), scales.flatten().cpu())
    assert torch.equal(found.values.cpu().float(), q.cpu().float())


def near(found: Quantized, expected: Quantized, most: float = 0.02) -> None:
    """The same up to a last bit of the scale and few steps where a sum went another way."""
    if expected.scales is None:
        assert found.scales is None
        torch.testing.assert_close(found.values.float(), expected.values.float(), rtol=1e-2, atol=1e-3)
        return
    assert found.scales is not None
    torch.testing.assert_close(found.scales, expected.scales, rtol=1e-2, atol=0)
    unlike = found.values.float() != expected.values.float()
    assert float(unlike.float().mean()) <= most + 2 / unlike.numel()
    assert torch.all((found.values.float() - expected.values.float()).abs() <= expected.values.float().abs() * 0.13 + 1)


@pytest.mark.parametrize("precision", PRECISIONS)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_rows_have_the_bits_of_the_format(
    precision: Precision, shape: tuple[int, int], device: torch.device, dtype: torch.dtype
) -> None:
    x = numbers(device, dtype, *shape)
    x[0, 0] = 0
    same_bits(quantize(x, precision), *quantize_activations(x.cpu(), precision))
    smooth = torch.rand(shape[1]).to(device) + 0.5
    expected = quantize_activations(x.cpu().float() * smooth.cpu(), precision)
    same_bits(quantize(x, precision, smooth), *expected)


@pytest.mark.parametrize("precision", PRECISIONS)
def test_ties_and_the_smallest_numbers(precision: Precision, device: torch.device) -> None:
    limit = {"fp8": 448.0, "int8": 127.0}[precision]
    steps = torch.cat([torch.arange(0, 32) / 2 + 16, torch.arange(0, 64) * 2.0**-10, torch.tensor([1.0, 15.75, limit])])
    x = torch.cat([steps, -steps])[None].to(device)
    same_bits(quantize(x, precision), *quantize_activations(x.cpu(), precision))
    found = quantize(torch.zeros(2, 16, device=device), precision)
    assert found.scales is not None and not found.scales.any() and not found.values.float().any()


def test_rows_may_lie_apart(device: torch.device) -> None:
    wide = numbers(device, torch.float32, 4, 96)
    same_bits(quantize(wide[:, 32:64], "int8"), *quantize_activations(wide[:, 32:64].cpu(), "int8"))


@pytest.mark.parametrize("precision", ["none", *PRECISIONS])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_norm_and_some_rows_of_it(
    precision: Precision, shape: tuple[int, int], device: torch.device, dtype: torch.dtype
) -> None:
    x, norm = numbers(device, dtype, *shape), (1 + torch.rand(shape[1])).to(device, dtype)
    smooth = torch.rand(shape[1]).to(device) + 0.5
    near(norm_quantize(x, norm, EPS, precision, smooth), norm_quantize_reference(x, norm, EPS, precision, smooth))
    rows = torch.tensor([shape[0] - 1, 0, shape[0] - 1], device=device)
    near(norm_quantize(x, norm, EPS, precision, rows=rows), norm_quantize_reference(x[rows], norm, EPS, precision))


@pytest.mark.parametrize("precision", ["none", *PRECISIONS])
@pytest.mark.parametrize("kind", [torch.float32, torch.int32])
def test_parts_are_added_to_the_residual(
    precision: Precision, kind: torch.dtype, device: torch.device, dtype: torch.dtype
) -> None:
    m, n = 3, 70
    x, norm = numbers(device, dtype, m, n), (1 + torch.rand(n)).to(device, dtype)
    sums = Sums(
        (torch.randn(3, m, n) * 50).to(device, kind),
        torch.rand(m, device=device) / 50,
        torch.rand(n, device=device),
        numbers(device, dtype, n),
    )
    expected = (x.float() + total_reference(sums)).to(dtype)
    found = add_norm_quantize_(x, sums, norm, EPS, precision)
    torch.testing.assert_close(x, expected, rtol=2e-3, atol=2e-3)
    near(found, norm_quantize_reference(x, norm, EPS, precision))


@pytest.mark.parametrize("precision", PRECISIONS)
@pytest.mark.parametrize("scaled", [False, True])
def test_silu(precision: Precision, scaled: bool, device: torch.device, dtype: torch.dtype) -> None:
    m, n = 3, 70
    gate_up = Sums(numbers(device, dtype, 1, m, 2 * n))
    if scaled:
        raw = torch.randint(-999, 999, (1, m, 2 * n), dtype=torch.int32, device=device)
        scales = torch.rand(m, device=device) / 99, torch.rand(2 * n, device=device)
        gate_up = Sums(raw, *scales, numbers(device, dtype, 2 * n))
    smooth = torch.rand(n, device=device) + 0.5
    found = silu_mul_quantize(gate_up, precision, dtype, smooth)
    near(found, silu_mul_quantize_reference(gate_up, precision, dtype, smooth))


def test_no_rows(device: torch.device) -> None:
    found = quantize(torch.empty(0, 16, device=device), "fp8")
    assert found.values.shape == (0, 16) and found.scales is not None and found.scales.shape == (0,)


def test_a_row_does_not_depend_on_the_batch(device: torch.device, dtype: torch.dtype) -> None:
    x, norm = numbers(device, dtype, 4, 70), (1 + torch.rand(70)).to(device, dtype)
    whole, alone = norm_quantize(x, norm, EPS, "int8"), norm_quantize(x[2:3], norm, EPS, "int8")
    assert whole.scales is not None and alone.scales is not None
    assert torch.equal(whole.values[2:3], alone.values) and torch.equal(whole.scales[2:3], alone.scales)


def test_the_reference_is_the_formats(device: torch.device) -> None:
    x = F.normalize(numbers(device, torch.float32, 3, 40))
    q, scales = quantize_activations(x, "int8")
    expected = quantize_reference(x, "int8")
    assert expected.scales is not None
    assert torch.equal(expected.values, q) and torch.equal(expected.scales[:, None], scales)
