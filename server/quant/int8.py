"""Layers of 8-bit weights with activations of 8 bits or none.

CPU, float32 or bfloat16 in and out:
  int8+int8         exact sums of 8-bit products, then both scales in float32 (`integer`)
  int8              weight-only: three such products, activations in 23-bit fixed point (`integer`)
  int8-g32+int8-group   exact sums of each group, float32 over the groups (`server.quant.cpu`)
  others            dequantised (`dequantized`): float32 throughout in a float32 network
"""

from __future__ import annotations

import torch
from torch import Tensor

from server.quant import groups, integer
from server.quant.cuda import on_cuda
from server.quant.dequantized import DequantizedLinear
from server.quant.formats import QuantizedWeight
from server.quant.layer import LinearLayer

__all__ = ["on_cpu", "on_cuda"]


def on_cpu(weight: QuantizedWeight, bias: Tensor | None, dtype: torch.dtype) -> LinearLayer:
    """The layer for activations of `dtype`."""
    if integer.why_not(weight) is None:
        return integer.IntegerLinear(weight, bias)
    grouped = groups.on_cpu(weight, bias) if dtype == torch.float32 else None
    return grouped or DequantizedLinear(weight, bias, dtype)
