"""Layers of 4-bit weights, activations as they come (W4A16) or in 8 bits by groups.

CPU:
  int4-g32[-min]+int8-group   exact sums of each group, float32 over the groups (`server.quant.cpu`)
  int4 without groups         three 8-bit products, activations in 23-bit fixed point (`integer`); a byte a weight
  others                      dequantised (`dequantized`): float32 throughout in a float32 network

torch's `_weight_int4pack_mm_for_cpu` is not taken: it computes in bfloat16 and rounds scales and minimums to it, which
changes the weights.

GPU:
  int4-gN[-min], N 16, 32, 64 or 128
                              integers multiplied in the activations' own type, scales and minimums applied to float32
                              sums (`server.kernels.int4_product`); above 256 tokens dequantised for the step
  others                      dequantised
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
