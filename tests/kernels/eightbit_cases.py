"""Low-precision weights and activations of every kind for the tests of their kernels."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from server.kernels.eightbit_product import pack_groups
from server.kernels.eightbit_tiles import EightTile, Weight, weight8
from server.kernels.int4_product import pack_quads
from server.kernels.quantize import Precision, Quantized, quantize_reference
from server.quant.formats import FP8, ActivationKind, LinearFormat, QuantizedWeight, WeightKind

FORMATS: dict[str, LinearFormat] = {
    "fp8": LinearFormat("fp8", "fp8"),
    "int8": LinearFormat("int8", "int8"),
    "int8-only": LinearFormat("int8"),
    "w4a8-int8": LinearFormat("int4", "int8", group_size=32),
    "w4a8-fp8": LinearFormat("int4", "fp8", group_size=32),
    "int4": LinearFormat("int4", group_size=32),
    "int4-min": LinearFormat("int4", group_size=16, minimum=True),
}
TILES = {
    "plain": EightTile(16, 64, num_stages=2, prefetch=64),
    "split": EightTile(16, 128, split=2, num_stages=2),
    "whole": EightTile(16, 128, split=2, num_stages=1),
    "swap": EightTile(16, 32, swap=True, num_stages=2),
}


@dataclass(frozen=True)
class Case:
    """x quantised as the format says, and W beside its dequantised twin."""

    x: Quantized
    weight: Weight
    plain: Tensor
    stored: QuantizedWeight


def quantized_weight(format: LinearFormat, n: int, k: int, device: torch.device) -> QuantizedWeight:
    shape = (n,) if format.group_size is None else (n, k // format.group_size)
    kind: WeightKind = format.weights
    scales = (torch.rand(shape) + 0.5) / k**0.5 / {"fp8": 1, "int8": 73, "int4": 5}[kind]
    if kind == "fp8":
        return QuantizedWeight(format, torch.randn(n, k).to(FP8).to(device), scales.to(device))
    if kind == "int8":
        return QuantizedWeight(format, torch.randint(-127, 128, (n, k)).to(torch.int8).to(device), scales.to(device))
    values = torch.randint(0, 256, (n, k // 2)).to(torch.uint8).to(device)
    minimums = -8 * scales * (torch.rand(shape) + 0.5) if format.minimum else None
    return QuantizedWeight(format, values, scales.to(device), None if minimums is None else minimums.to(device))


def as_weight(stored: QuantizedWeight) -> Weight:
    form = stored.format
    if form.group_size is None:
        return weight8(stored.values, stored.scales)
    if form.activations == "none":
        packed, scales = pack_quads(stored.integers(), stored.scales, stored.minimums, form.group_size)
        return Weight(packed, scales, stored.shape[1], form.group_size, form.minimum)
    packed, scales = pack_groups(stored.numbers(), stored.scales, form.group_size, form.activations)
    return Weight(packed, scales, stored.shape[1], form.group_size)


def activations(x: Tensor, kind: ActivationKind) -> Quantized:
    precision: Precision = "none" if kind == "int8-group" else kind
    return quantize_reference(x, precision)


def made(name: str, m: int, n: int, k: int, device: torch.device, dtype: torch.dtype) -> Case:
    stored = quantized_weight(FORMATS[name], n, k, device)
    x = torch.randn(m, k).to(device, dtype)
    return Case(activations(x, stored.format.activations), as_weight(stored), stored.dequantize(), stored)


def poisoned(x: Quantized) -> Quantized:
    """The same rows with others behind them that nobody may see."""
    values = torch.cat([x.values.view(torch.uint8), torch.full_like(x.values.view(torch.uint8), 127)])
    scales = None if x.scales is None else torch.cat([x.scales, torch.full_like(x.scales, float("nan"))])
    rows = len(x.values)
    return Quantized(values.view(x.values.dtype)[:rows], None if scales is None else scales[:rows])


def tile_for(name: str, k: int, group: int) -> EightTile | None:
    """The tile if it can be used for such a K, else None: what would be chosen."""
    if group:
        return TILES[name] if name in ("plain", "swap") else None
    return TILES[name] if name != "whole" or k <= 128 else None
