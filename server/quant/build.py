"""Which implementation computes a linear layer: by the format of its weight and the device that it is on."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import groupby
from types import ModuleType

import torch
from torch import Tensor

from server.quant import fp8, int4, int8, w4a8
from server.quant.dense import Linear
from server.quant.dequantized import SUFFIX
from server.quant.formats import QuantizedWeight
from server.quant.layer import LinearLayer
from server.quant.sketch import LinearSketch

__all__ = ["Joined", "LayerPaths", "LinearLayer", "linear_of", "min_rows", "paths_of"]

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


@dataclass(frozen=True, slots=True)
class LayerPaths:
    """A group of layers that are stored and computed alike. `dequantised`: no low-bit kernel runs."""

    layers: str
    count: int
    format: str
    path: str
    dequantised: bool = False


def paths_of(layers: Mapping[str, tuple[str, str]]) -> list[LayerPaths]:
    """Groups of `layers` (name to format and path), largest first; a number in names that differ only there is `*`."""
    key = lambda item: item[1]  # noqa: E731
    found: list[LayerPaths] = []
    for (form, path), items in groupby(sorted(layers.items(), key=key), key=key):
        names = [name for name, _ in items]
        patterns = sorted({".".join("*" if part.isdigit() else part for part in name.split(".")) for name in names})
        found.append(LayerPaths(", ".join(patterns), len(names), form, path, SUFFIX in path))
    return sorted(found, key=lambda group: -group.count)
