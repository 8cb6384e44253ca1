"""Layers of 4-bit weights with 8-bit activations, one scale a token (W4A8).

CPU: without groups exact sums of 8-bit products (`integer`; a byte a weight); with groups dequantised
(`dequantized`): activations are rounded to 8 bits all the same, sums are float32 in a float32 network.

GPU: groups of 32, 64 or 128 by Triton for few tokens, dequantised for the call for many (`low`, `cuda`).
"""

from __future__ import annotations

import torch
from torch import Tensor

from server.quant import integer
from server.quant.cuda import on_cuda
from server.quant.dequantized import DequantizedLinear
from server.quant.formats import QuantizedWeight
from server.quant.layer import LinearLayer

__all__ = ["on_cpu", "on_cuda"]


def on_cpu(weight: QuantizedWeight, bias: Tensor | None, dtype: torch.dtype) -> LinearLayer:
    """The layer for activations of `dtype`."""
    if integer.why_not(weight) is None:
        return integer.IntegerLinear(weight, bias)
    return DequantizedLinear(weight, bias, dtype)
