"""Linear layers: the product, and the bits that speculation relies on."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from server.quant.dense import Linear, packing_available

SHAPES = [(576, 960), (576, 576), (576, 3072), (1536, 576), (2048, 512), (33, 7), (64, 1)]
"""(K, O): SmolLM2-135M's, one with a long reduction, and odd ones."""
needs_packing = pytest.mark.skipif(not packing_available(), reason="this torch has no oneDNN prepacked linear")


def layer(k: int, o: int, bias: bool = False) -> tuple[Linear, torch.Tensor, torch.Tensor | None]:
    generator = torch.Generator().manual_seed(k + o)
    weight = torch.randn(o, k, generator=generator) / k**0.5
    b = torch.randn(o, generator=generator) if bias else None
    return Linear(weight, b), weight, b


@pytest.mark.parametrize(("k", "o"), SHAPES)
@pytest.mark.parametrize("bias", [False, True])
def test_is_the_product(k: int, o: int, bias: bool) -> None:
    linear, weight, b = layer(k, o, bias)
    assert (linear.in_features, linear.out_features) == (k, o)
    for rows in (0, 1, 2, 5, 40, 300):
        x = torch.randn(rows, k)
        expected = F.linear(x.double(), weight.double(), None if b is None else b.double())
        assert linear(x).shape == (rows, o)
        torch.testing.assert_close(linear(x).double(), expected, atol=1e-4, rtol=1e-4)


@needs_packing
@pytest.mark.parametrize(("k", "o"), SHAPES)
def test_a_rows_bits_depend_on_nothing_else(k: int, o: int) -> None:
    linear, _, _ = layer(k, o)
    assert linear.path == "onednn-packed"
    x = torch.randn(40, k, generator=torch.Generator().manual_seed(1))
    bits = linear(x)
    for rows in range(1, 41):
        assert torch.equal(linear(x[:rows]), bits[:rows]), f"the first {rows} rows"
        assert torch.equal(linear(x[40 - rows :]), bits[40 - rows :]), f"the last {rows} rows"
    order = torch.randperm(40, generator=torch.Generator().manual_seed(2))
    assert torch.equal(linear(x[order]), bits[order])
    large = torch.cat([torch.randn(500, k), x, torch.randn(123, k)])
    assert torch.equal(linear(large)[500:540], bits), "among a prefill's rows"


@pytest.mark.parametrize(("k", "o"), SHAPES)
def test_the_weight_as_it_was_given(k: int, o: int) -> None:
    linear, weight, _ = layer(k, o)
    assert torch.equal(linear.plain_weight(), weight)


def test_other_dtypes_run_unpacked() -> None:
    weight = torch.randn(8, 4, dtype=torch.bfloat16)
    linear = Linear(weight)
    x = torch.randn(3, 4, dtype=torch.bfloat16)
    assert linear.path == "torch" and linear.weight is weight is linear.plain_weight()
    assert torch.equal(linear(x), F.linear(x, weight))
