"""Minimums as whole zero points, where they are that."""

from __future__ import annotations

import torch
from torch import Tensor

from server.quant.formats import QuantizedWeight

_ROUNDINGS = 2.0
"""Units in the last place that a stored minimum may lie beside −zero · scale."""


def zero_points(weight: QuantizedWeight) -> Tensor | None:
    """Z with w = scale · (q − z), float32 of whole numbers shaped as the scales; None where a minimum is no such one.

    q is 0 … 15 of int4 and −128 … 127 of int8, and so is z.
    """
    scales = weight.scales.float()
    if weight.minimums is None:
        return torch.full_like(scales, 8.0 if weight.format.weights == "int4" else 0.0)
    minimums = weight.minimums.float()
    low, high = (0, 15) if weight.format.weights == "int4" else (-128, 127)
    zeros = torch.where(scales != 0, -minimums / torch.where(scales != 0, scales, 1.0), 0.0).round()
    error = (minimums + zeros * scales).abs()
    allowed = _ROUNDINGS * torch.finfo(weight.minimums.dtype).eps * minimums.abs()
    fits = (error <= allowed) & (zeros >= low) & (zeros <= high)
    return zeros if bool(fits.all()) else None
