"""Products of many tokens: the same function as those of a few."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from server.kernels.eightbit_large import dequantized_groups, large_parts, plain_words, total
from server.kernels.eightbit_linear import linear8, linear8_reference
from server.kernels.quantize import Sums, total_reference
from tests.kernels.close import assert_close
from tests.kernels.conftest import ON_GPU
from tests.kernels.eightbit_cases import FORMATS, as_weight, made
from tests.kernels.test_eightbit import FLOAT8_SUMS, short_sums

SHAPES = [(20, 32, 64)] + ([(70, 48, 96), (512, 4096, 4096)] if ON_GPU else [(5, 16, 32)])


@pytest.mark.parametrize("name", FORMATS)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_large(name: str, shape: tuple[int, int, int], device: torch.device, dtype: torch.dtype) -> None:
    m, n, k = shape
    case = made(name, m, n, k, device, dtype)
    bias = torch.randn(n).to(device, dtype)
    found = total(large_parts(case.x, case.weight, dtype, bias), dtype)
    scale = FLOAT8_SUMS if short_sums(name, dtype) else 2.0
    assert_close(found, linear8_reference(case.x, case.plain, bias).to(dtype), dtype, scale=scale)
    if m <= 64:
        assert_close(found, linear8(case.x, case.weight, dtype, bias), dtype, scale=scale)


@pytest.mark.parametrize("name", ["w4a8-int8", "w4a8-fp8"])
def test_groups_come_back(name: str, device: torch.device) -> None:
    case = made(name, 1, 24, 96, device, torch.float32)
    torch.testing.assert_close(dequantized_groups(case.weight, case.x.values.dtype), case.plain)


@pytest.mark.parametrize("name", ["int4", "int4-min"])
@pytest.mark.parametrize("k", [64, 96, 160, 256])
def test_words_come_back(name: str, k: int, device: torch.device, dtype: torch.dtype) -> None:
    """Whole words of four groups, and padded ones; rounded once."""
    case = made(name, 1, 70, k, device, torch.float32)
    torch.testing.assert_close(plain_words(case.weight, dtype), case.plain.to(dtype))  # a GPU fuses scale and minimum
    stored = replace(case.stored, scales=case.stored.scales.half())
    if stored.minimums is not None:
        stored = replace(stored, minimums=stored.minimums.half())
    weight = as_weight(stored)
    assert weight.scales.dtype == torch.float16
    torch.testing.assert_close(plain_words(weight, dtype), stored.dequantize(dtype))


def test_totals(device: torch.device, dtype: torch.dtype) -> None:
    parts = torch.randint(-999, 999, (1, 3, 70), dtype=torch.int32, device=device)
    sums = Sums(parts, torch.rand(3, device=device), torch.rand(70, device=device), torch.randn(70).to(device, dtype))
    assert_close(total(sums, dtype), total_reference(sums).to(dtype), dtype)
    plain = torch.randn(1, 3, 70).to(device, dtype)
    assert total(Sums(plain), dtype).data_ptr() == plain.data_ptr()
    assert total(Sums(parts[:, :0]), dtype).shape == (0, 70)
