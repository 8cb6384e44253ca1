"""Which implementation computes a linear layer: by the format of its weight and the device that it is on."""

from __future__ import annotations

from collections.abc import Sequence
from types import ModuleType

import torch
from torch import Tensor

from server.quant import fp8, int4, int8, w4a8
from server.quant.dense import Linear
from server.quant.formats import QuantizedWeight
from server.quant.layer import LinearLayer
from server.quant.sketch import LinearSketch

__all__ = ["Joined", "LinearLayer", "Weight", "linear_of", "min_rows", "parts_of"]

Weight = Tensor | QuantizedWeight


def linear_of(weight: Weight, bias: Tensor | None = None, *, dtype: torch.dtype | None = None) -> LinearLayer:
    """The layer `y = x Wᵀ + b` of W [O, K] and b [O], for activations x [N, K] of `dtype`.

    `dtype` matters for quantised weights only; None is what networks take by themselves on their device: float32 on a
    CPU, else bfloat16. On torch's `meta` device the layer can be asked for its shape and what it will hold.
    """
    if isinstance(weight, Tensor):
        return Linear(weight, bias)
    device = weight.device.type
    if dtype is None:
        dtype = torch.float32 if device == "cpu" else torch.bfloat16
    if device == "meta":
        return LinearSketch(weight, bias, dtype)
    module = _module(weight)
    layer: LinearLayer = (module.on_cuda if device == "cuda" else module.on_cpu)(weight, bias, dtype)
    return layer


def _module(weight: QuantizedWeight) -> ModuleType:
    form = weight.format
    if form.weights == "int4":
        return w4a8 if form.activations in ("int8", "fp8") else int4
    return fp8 if form.weights == "fp8" else int8


class Joined:
    """Layers of one input that are called as one; outputs lie side by side. For parts that `formats.join` refuses."""

    def __init__(self, parts: Sequence[LinearLayer]) -> None:
        self.parts = tuple(parts)
        self.in_features = parts[0].in_features
        self.out_features = sum(part.out_features for part in parts)
        biases = [part.bias for part in parts if part.bias is not None]
        self.bias = torch.cat(biases) if len(biases) == len(parts) else None
        self.format = " | ".join(dict.fromkeys(part.format for part in parts))
        self.path = " | ".join(dict.fromkeys(part.path for part in parts))
        self.min_rows = max(min_rows(part) for part in parts)

    def __call__(self, x: Tensor) -> Tensor:
        return torch.cat([part(x) for part in self.parts], dim=-1)

    def plain_weight(self) -> Tensor:
        """W [O, K] of all parts; a copy."""
        return torch.cat([part.plain_weight() for part in self.parts])


def min_rows(layer: LinearLayer) -> int:
    """Smaller steps are padded to so many rows by whoever calls the layer often; it takes any number."""
    rows: int = getattr(layer, "min_rows", 1)
    return rows


def parts_of(layer: LinearLayer) -> tuple[LinearLayer, ...]:
    """The layers that run behind one call."""
    return layer.parts if isinstance(layer, Joined) else (layer,)
