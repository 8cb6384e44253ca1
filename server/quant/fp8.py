"""Layers of fp8 (e4m3) weights, activations as they come or in fp8 with one scale a token.

CPU: dequantised (`dequantized`); activations are rounded to fp8 all the same, sums are float32 in a float32 network.
Processors without AMX-FP8 have no products of fp8 numbers, and torch's `_scaled_mm` converts at each call there.

GPU: Triton for few tokens, torch's 8-bit products for many (`low`, `cuda`).
"""

from __future__ import annotations

import torch
from torch import Tensor

from server.quant.cuda import on_cuda
from server.quant.dequantized import DequantizedLinear
from server.quant.formats import QuantizedWeight
from server.quant.layer import LinearLayer

__all__ = ["on_cpu", "on_cuda"]


def on_cpu(weight: QuantizedWeight, bias: Tensor | None, dtype: torch.dtype) -> LinearLayer:
    """The layer for activations of `dtype`."""
    return DequantizedLinear(weight, bias, dtype)
