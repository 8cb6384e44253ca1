"""Quantised layers where there is no low-bit kernel: the weight is dequantised once, when it is loaded.

Weights lose nothing and cost memory and bandwidth as if they were plain. Activations are still quantised as the format
says, so the layer computes the same function as a kernel would, up to the rounding of its sums. In float32 on a CPU
that is float32 throughout. In bfloat16 the weight is rounded to it once, quantised activations are exact in it (8
bits, or an fp8 number), and their scale is applied to the product; with a scale for each group of columns activations
are rounded to it after scaling.
"""

from __future__ import annotations

import torch
from torch import Tensor

from server.quant.dense import Linear
from server.quant.formats import QuantizedWeight, quantize_activations

DEQUANTISED = "-dequantised"
"""How such a path ends."""


class DequantizedLinear:
    """`y = x Wᵀ + b` for x [N, K]; implements server.quant.layer.LinearLayer."""

    __slots__ = ("_bias", "_form", "_input_scales", "_linear", "format", "in_features", "out_features", "path")

    def __init__(self, weight: QuantizedWeight, bias: Tensor | None, dtype: torch.dtype) -> None:
        self.out_features, self.in_features = weight.shape
        self._form = weight.format
        self.format = weight.format.name
        by_row = weight.format.activations in ("int8", "fp8")
        as_they_come = weight.format.activations == "none"  # then factors may as well be in the weight
        self._input_scales = None if as_they_come else weight.input_scales
        made = weight.effective(dtype) if as_they_come else weight.dequantize(dtype)
        # The scale of a row is applied to the product, so a bias comes after it.
        self._linear = Linear(made, None if by_row else bias)
        self._bias = bias
        self.path = self._linear.path + DEQUANTISED

    @property
    def bias(self) -> Tensor | None:
        """The bias, [O]."""
        return self._bias

    @property
    def min_rows(self) -> int:
        """See `server.quant.dense.Linear.min_rows`."""
        return self._linear.min_rows

    def __call__(self, x: Tensor) -> Tensor:
        form = self._form
        if form.activations == "none":
            return self._linear(x)
        inputs = x if self._input_scales is None else x.float() * self._input_scales.float()
        q, scales = quantize_activations(inputs, form.activations, form.group_size)
        if form.activations == "int8-group":
            grouped = q.float().unflatten(1, (scales.shape[1], -1)) * scales[:, :, None]
            return self._linear(grouped.flatten(1).to(x.dtype))
        result = self._linear(q.to(x.dtype)).float() * scales
        if self._bias is not None:
            result += self._bias
        return result.to(x.dtype)

    def plain_weight(self) -> Tensor:
        """W [O, K] as it was dequantised, factors of the activations in it."""
        weight = self._linear.plain_weight()
        return weight if self._input_scales is None else (weight.float() * self._input_scales.float()).to(weight.dtype)
