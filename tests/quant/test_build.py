"""Who computes a layer: by format and device; what a sketch holds; what is reported."""

from __future__ import annotations

from dataclasses import fields

import pytest
import torch
from torch import Tensor

from server.engine.footprint import as_on, tensor_bytes
from server.quant import fp8, int4, int8, w4a8
from server.quant.build import Joined, Weight, linear_of, min_rows, parts_of
from server.quant.dense import Linear, as_dense
from server.quant.formats import LinearFormat, QuantizedWeight
from tests.quant.layers import inputs, weight_of

FORMATS = [
    LinearFormat("fp8", "fp8"),
    LinearFormat("int8"),
    LinearFormat("int8", "int8", smooth=True),
    LinearFormat("int8", group_size=32),
    LinearFormat("int8", "int8-group", 32),
    LinearFormat("int4", group_size=64, minimum=True),
    LinearFormat("int4", "int8-group", 32, minimum=True),
    LinearFormat("int4", "int8", 64),
]


def on_meta(weight: QuantizedWeight) -> QuantizedWeight:
    return weight.to(torch.device("meta"))


def test_plain_weights_are_the_dense_layer() -> None:
    layer = linear_of(torch.randn(8, 16), torch.randn(8))
    assert isinstance(layer, Linear) and layer.format == "float32" and as_dense(layer) is layer
    with pytest.raises(TypeError, match="no plain weight"):
        as_dense(linear_of(weight_of(LinearFormat("int8"), 8, 16)))


@pytest.mark.parametrize("form", FORMATS, ids=lambda f: f.name)
def test_each_format_has_a_module(form: LinearFormat, monkeypatch: pytest.MonkeyPatch) -> None:
    called: list[str] = []
    for module in (fp8, int4, int8, w4a8):
        for name in ("on_cpu", "on_cuda"):
            monkeypatch.setattr(module, name, lambda *a, m=module, n=name: called.append(f"{m.__name__[13:]}.{n}"))
    linear_of(weight_of(form, 16, 64))
    wanted = form.weights if form.weights != "int4" or form.activations != "int8" else "w4a8"
    assert called == [f"{wanted}.on_cpu"]


@pytest.mark.parametrize("form", FORMATS, ids=lambda f: f.name)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_sketch_holds_what_the_layer_holds(form: LinearFormat, dtype: torch.dtype) -> None:
    weight = weight_of(form, 48, 128)
    layer, sketch = linear_of(weight, dtype=dtype), linear_of(on_meta(weight), dtype=dtype)
    assert tensor_bytes(sketch) == sum(
        t.nbytes for f in fields(weight) if isinstance(t := getattr(weight, f.name), Tensor)
    )
    as_on(torch.device("cpu"), sketch)
    held = tensor_bytes(layer)
    assert tensor_bytes(sketch) == held
    with pytest.raises(RuntimeError, match="sketch"):
        sketch(inputs(2, 128))


def test_parts_of_different_formats_are_called_as_one() -> None:
    weights = [weight_of(LinearFormat("int8"), 8, 64), weight_of(LinearFormat("int4", group_size=32), 24, 64)]
    plain = torch.randn(5, 64)
    bias = torch.randn(37)
    stored: list[Weight] = [*weights, plain]
    parts = [linear_of(w, b) for w, b in zip(stored, bias.split([8, 24, 5]), strict=True)]
    both, x = Joined(parts), inputs(9, 64)
    assert torch.equal(both(x), torch.cat([part(x) for part in parts], dim=1))
    assert (both.in_features, both.out_features) == (64, 37) and both.bias is not None and torch.equal(both.bias, bias)
    assert torch.equal(both.plain_weight()[32:], plain) and len(both.plain_weight()) == 37
    assert parts_of(both) == tuple(parts) and parts_of(parts[0]) == (parts[0],)
    assert all(part.path in both.path and part.format in both.format for part in parts)
    assert min_rows(both) == max(min_rows(part) for part in parts)
