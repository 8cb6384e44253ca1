"""The description of low-precision weights: what is valid, and its oracle on numbers worked out by hand."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch

from server.quant.formats import (
    FP8,
    LinearFormat,
    QuantizedWeight,
    can_join,
    join,
    quantize_activations,
    reference_linear,
)
from tests.quant.rounding import rounded


def test_int4_by_hand() -> None:
    values = torch.tensor([[0x10 * i + 15 - i for i in range(16)]], dtype=torch.uint8)  # 15 0 14 1 13 2 …
    numbers = [n for i in range(16) for n in (15 - i, i)]
    scales, minimums = torch.tensor([[0.5, 2.0]]), torch.tensor([[1.0, -3.0]])
    with_minimum = QuantizedWeight(LinearFormat("int4", group_size=16, minimum=True), values, scales, minimums)
    wanted = [0.5 * n + 1.0 for n in numbers[:16]] + [2.0 * n - 3.0 for n in numbers[16:]]
    assert with_minimum.dequantize().tolist() == [wanted] and with_minimum.shape == (1, 32)
    centred = QuantizedWeight(LinearFormat("int4", group_size=16), values, scales)
    wanted = [0.5 * (n - 8) for n in numbers[:16]] + [2.0 * (n - 8) for n in numbers[16:]]
    assert centred.dequantize().tolist() == [wanted]


@pytest.mark.parametrize("form", [LinearFormat("fp8"), LinearFormat("int8", group_size=16), LinearFormat("int4")])
def test_rounding_to_nearest_is_within_half_a_step(form: LinearFormat) -> None:
    weight = torch.randn(5, 48)
    made = rounded(weight, form, torch.float32)
    step = made.scales.view(5, -1, 1) * (32 if form.weights == "fp8" else 1)
    error = (made.dequantize() - weight).view(5, step.shape[1], -1).abs()
    assert bool((error <= step * (0.5001 if form.weights != "int4" else 1.001)).all())


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"weights": "int3"}, "weights: 'int3'"),
        ({"weights": "int8", "activations": "int4"}, "activations: 'int4'"),
        ({"weights": "int8", "group_size": 24}, "group_size: 24"),
        ({"weights": "int8", "activations": "int8-group"}, "needs a group_size"),
        ({"weights": "fp8", "minimum": True}, "minimum"),
    ],
)
def test_what_is_not_valid_is_named(fields: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        LinearFormat(**fields)


def test_parts_must_fit() -> None:
    weight = rounded(torch.randn(6, 32), LinearFormat("int8", group_size=16, smooth=True))
    for changes, message in (
        ({"scales": weight.scales[:5]}, "scales are"),
        ({"minimums": weight.scales}, "minimums"),
        ({"input_scales": None}, "input_scales"),
        ({"values": weight.values.view(torch.uint8)}, "values are"),
        ({"values": weight.values[:, :24]}, "does not divide"),
    ):
        with pytest.raises(ValueError, match=message):
            replace(weight, **changes)


@pytest.mark.parametrize("kind", ["fp8", "int8", "int4"])
def test_rows_and_joined_parts(kind: str) -> None:
    form = LinearFormat(kind, group_size=16, minimum=kind == "int4")  # type: ignore[arg-type]
    weight = rounded(torch.randn(6, 32), form)
    order = torch.tensor([4, 1, 1])
    assert torch.equal(weight.rows(order).dequantize(), weight.dequantize()[order])
    assert torch.equal(join([weight, weight.rows(order)]).dequantize()[6:], weight.dequantize()[order])
    other = rounded(torch.randn(6, 32), LinearFormat(kind, group_size=32, minimum=kind == "int4"))  # type: ignore[arg-type]
    assert not can_join([weight, other])
    with pytest.raises(ValueError, match="cannot be joined"):
        join([weight, other])


def test_parts_with_other_factors_cannot_be_joined() -> None:
    weight = rounded(torch.randn(6, 32), LinearFormat("int8", smooth=True))
    assert weight.input_scales is not None and can_join([weight, weight])
    assert not can_join([weight, replace(weight, input_scales=weight.input_scales * 2)])


def test_activations_by_hand() -> None:
    x = torch.tensor([[127.0, -63.5, 0.5, 1.5], [0.0, 0.0, 0.0, 0.0]])
    q, scales = quantize_activations(x, "int8")
    assert q.tolist() == [[127, -64, 0, 2], [0, 0, 0, 0]] and scales.tolist() == [[1.0], [0.0]]
    q, scales = quantize_activations(torch.tensor([[448.0, -1.0625]]), "fp8")
    assert q.dtype == FP8 and q.float().tolist() == [[448.0, -1.0]] and scales.tolist() == [[1.0]]
    x = torch.cat([torch.full((1, 16), 254.0), torch.full((1, 16), 12.7)], dim=1)
    q, scales = quantize_activations(x, "int8-group", 16)
    assert bool((q == 127).all()) and torch.allclose(scales, torch.tensor([[2.0, 0.1]]))


def test_the_reference_applies_factors_first() -> None:
    weight = rounded(torch.randn(4, 16), LinearFormat("int8", smooth=True))
    x = torch.randn(3, 16)
    assert weight.input_scales is not None
    wanted = (x * weight.input_scales) @ weight.dequantize().t() + 1.0
    assert torch.allclose(reference_linear(x, weight, torch.ones(4)), wanted, atol=1e-5)
