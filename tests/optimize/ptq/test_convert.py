from __future__ import annotations

import pytest
import torch

from optimize.ptq.convert import quantize_weight
from optimize.recipe import LayerFormat
from server.quant.formats import reference_linear


@pytest.mark.parametrize(
    ("form", "bound"),
    [
        (LayerFormat("int8"), 0.5 / 127),
        (LayerFormat("int8", group_size=32), 0.5 / 127),
        (LayerFormat("int8", minimum=True), 0.51 / 127),
        (LayerFormat("fp8"), 0.04),
        (LayerFormat("int4", group_size=32), 0.51 / 7),
        (LayerFormat("int4", group_size=32, minimum=True), 0.51 / 7),
        (LayerFormat("int4"), 0.51 / 7),
    ],
)
def test_no_weight_is_further_off_than_half_a_step(form: LayerFormat, bound: float) -> None:
    weight = torch.randn(7, 96, generator=torch.Generator().manual_seed(1))
    grouped = weight.unflatten(1, (-1, form.group_size or 96))
    error = (quantize_weight(weight, form).dequantize() - weight).unflatten(1, (-1, form.group_size or 96)).abs()
    assert bool((error <= bound * grouped.abs().amax(-1, keepdim=True) + 1e-6).all())


def test_a_minimum_makes_one_sided_groups_finer() -> None:
    weight = torch.rand(4, 64, generator=torch.Generator().manual_seed(1)) + 3.0
    errors = [
        (quantize_weight(weight, LayerFormat("int4", group_size=32, minimum=m)).dequantize() - weight).abs().max()
        for m in (False, True)
    ]
    assert errors[1] < errors[0] / 3


def test_rows_of_zeros_stay_zero() -> None:
    weight = torch.zeros(2, 32)
    for form in (LayerFormat("int8"), LayerFormat("fp8"), LayerFormat("int4", group_size=32, minimum=True)):
        assert torch.equal(quantize_weight(weight, form).dequantize(), weight)


def test_scales_of_groups_are_narrow_unless_they_would_underflow() -> None:
    weight, form = torch.randn(4, 32), LayerFormat("int4", group_size=32)
    assert quantize_weight(weight, form).scales.dtype == torch.float16
    assert quantize_weight(weight * 1e-6, form).scales.dtype == torch.float32


def test_input_scales_take_from_the_weight_what_they_give_to_the_activations() -> None:
    generator = torch.Generator().manual_seed(1)
    weight, x = torch.randn(8, 32, generator=generator), torch.randn(3, 32, generator=generator)
    factors = torch.rand(32, generator=generator) + 0.5
    result = reference_linear(x, quantize_weight(weight, LayerFormat("int8"), input_scales=factors))
    assert torch.allclose(result, x @ weight.t(), atol=0.1)
    assert not torch.allclose(result, (x * factors) @ weight.t(), atol=0.5)
