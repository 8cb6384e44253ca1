"""8-bit weights against the oracle, and which kernel ran."""

from __future__ import annotations

import pytest
import torch

from server.quant import integer
from server.quant.build import linear_of
from server.quant.cpu.vectors import ISA
from server.quant.formats import LinearFormat
from tests.quant.layers import check, inputs, weight_of

exact = pytest.mark.skipif(not integer.available(), reason="no exact products of 8-bit numbers here")


@exact
@pytest.mark.parametrize("smooth", [False, True])
@pytest.mark.parametrize("activations", ["int8", "none"])
def test_integer_products(activations: str, smooth: bool) -> None:
    paths = {"int8": "onednn-int8", "none": "onednn-int8x3"}
    for layer in check(LinearFormat("int8", activations, smooth=smooth)):  # type: ignore[arg-type]
        assert layer.path == paths[activations]


@exact
def test_the_8_bit_kernel_is_called(monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[torch.dtype] = []
    product = integer._product

    def spy(rows: torch.Tensor, packed: torch.Tensor, scales: torch.Tensor) -> torch.Tensor:
        calls.extend((rows.dtype, packed.dtype))
        return product(rows, packed, scales)

    monkeypatch.setattr(integer, "_product", spy)
    linear_of(weight_of(LinearFormat("int8", "int8"), 16, 64))(inputs(3, 64))
    assert calls == [torch.uint8, torch.int8]


@exact
def test_sums_are_exact_where_they_pass_24_bits() -> None:
    weight = weight_of(LinearFormat("int8", "int8"), 40, 4096)
    weight.values.fill_(127)
    layer, x = linear_of(weight), torch.ones(9, 4096)
    wanted = (torch.tensor(127.0 * 127 * 4096) * weight.scales.float()) * torch.tensor(1 / 127.0)
    assert torch.allclose(layer(x), wanted.expand(9, -1), rtol=3e-7)
    assert torch.equal(layer(x[:1]), layer(x)[:1])


def test_fixed_point_is_within_its_bound() -> None:
    x = inputs(23, 576)
    limbs, factors = integer.split(x)
    whole = ((limbs.double() - 128) * torch.tensor([65536.0, 256.0, 1.0]).view(3, 1, 1)).sum(0)
    largest = x.abs().amax(1, keepdim=True)
    assert bool(((whole * factors.double() - x.double()).abs() <= factors / 2).all())
    assert bool((factors <= largest * 2**-21)[largest > 0].all())


@pytest.mark.parametrize("activations", ["int8", "none"])
def test_a_row_that_is_not_finite_says_so(activations: str) -> None:
    layer = linear_of(weight_of(LinearFormat("int8", activations), 16, 64))  # type: ignore[arg-type]
    x = inputs(3, 64)
    x[0, 5], x[1, 3] = torch.nan, torch.inf
    found = layer(x)
    assert not bool(found[:2].isfinite().any()) and bool(found[2].isfinite().all())


@pytest.mark.parametrize("group", [16, 32, 64])
@pytest.mark.parametrize("activations", ["none", "int8"])
def test_groups_are_dequantised(activations: str, group: int) -> None:
    for layer in check(LinearFormat("int8", activations, group)):  # type: ignore[arg-type]
        assert layer.path.endswith("-dequantised")


@pytest.mark.skipif(ISA is None, reason="this processor lacks AVX2")
def test_groups_of_both() -> None:
    for layer in check(LinearFormat("int8", "int8-group", 32)):
        assert layer.path == f"int8-g32+int8-group:{ISA}"


def test_without_exact_products_it_is_dequantised(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(integer, "available", lambda: False)
    for layer in check(LinearFormat("int8", "int8")):
        assert layer.path.endswith("-dequantised")


def test_bfloat16_networks() -> None:
    for activations in ("none", "int8"):
        check(LinearFormat("int8", activations), torch.bfloat16, 0.01)
        check(LinearFormat("int8", activations, 32), torch.bfloat16, 0.01)
