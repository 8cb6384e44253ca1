"""4-bit weights against the oracle, and which kernel ran."""

from __future__ import annotations

import pytest
import torch

from server.quant import integer
from server.quant.build import linear_of
from server.quant.cpu.vectors import ISA
from server.quant.formats import LinearFormat
from tests.quant.layers import check, weight_of


@pytest.mark.parametrize("group", [16, 32, 64])
@pytest.mark.parametrize("minimum", [False, True])
@pytest.mark.parametrize("smooth", [False, True])
def test_weight_only(group: int, minimum: bool, smooth: bool) -> None:
    for layer in check(LinearFormat("int4", "none", group, minimum, smooth)):
        assert layer.path.endswith("-dequantised")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_group_of_128(dtype: torch.dtype) -> None:
    x = torch.randn(5, 256, generator=torch.Generator().manual_seed(0)).to(dtype)
    weight = weight_of(LinearFormat("int4", "none", 128, minimum=True), 33, 256)
    found = linear_of(weight, dtype=dtype)(x).float()
    wanted = x.float() @ weight.dequantize().t()
    assert float((found - wanted).abs().max() / wanted.abs().max()) < (2e-6 if dtype == torch.float32 else 0.01)


@pytest.mark.skipif(not integer.available(), reason="no exact products of 8-bit numbers here")
def test_without_groups() -> None:
    for layer in check(LinearFormat("int4")):
        assert layer.path == "onednn-int8x3"


@pytest.mark.skipif(ISA is None, reason="this processor lacks AVX2")
@pytest.mark.parametrize("minimum", [False, True])
def test_groups_of_32_with_8_bit_activations(minimum: bool) -> None:
    for layer in check(LinearFormat("int4", "int8-group", 32, minimum)):
        assert layer.path.endswith(f":{ISA}")


def test_other_groups_with_8_bit_activations() -> None:
    for layer in check(LinearFormat("int4", "int8-group", 64)):
        assert layer.path.endswith("-dequantised")


@pytest.mark.skipif(ISA is None, reason="this processor lacks AVX2")
def test_scales_too_large_for_the_kernel_are_dequantised() -> None:
    weight = weight_of(LinearFormat("int4", "int8-group", 32), 48, 64)
    scales = weight.scales.float()
    scales[40, 1] = 1e6
    odd = type(weight)(weight.format, weight.values, scales)
    assert linear_of(odd).path.endswith("-dequantised")
