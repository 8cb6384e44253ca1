"""Quantised layers on a GPU: which have a low-bit kernel, what they hold in memory there, and the layers themselves.

Never imports Triton before such a layer is made: memory is planned on machines without a GPU too.
"""

from __future__ import annotations

import torch
from torch import Tensor

from server.quant.dequantized import DequantizedLinear
from server.quant.formats import LinearFormat, QuantizedWeight
from server.quant.layer import LinearLayer

GROUPS = (32, 64, 128)
"""Sizes of groups that the kernels of 4-bit weights with 8-bit activations take."""
WORD_GROUPS = (16, *GROUPS)
"""Those of 4-bit weights with activations as they come."""
_LEAST = 16
"""torch's 8-bit matrix products take whole multiples of it."""


def supported(form: LinearFormat) -> bool:
    """Whether there are kernels for the format: 8 bits a row, or 4 bits in groups (minimums: only where x is plain)."""
    if form.activations == "int8-group":
        return False
    if form.weights == "int4" and form.activations == "none":
        return form.group_size in WORD_GROUPS
    if form.minimum:
        return False
    if form.weights == "int4":
        return form.group_size in GROUPS
    return form.group_size is None and form.activations in ("none", form.weights)


def why_not(weight: QuantizedWeight) -> str | None:
    """Why no kernel takes a weight; None if one does."""
    rows, columns = weight.shape
    if not supported(weight.format):
        return f"format {weight.format.name} has no kernel here"
    if weight.format.group_size is None and (rows % _LEAST or columns % _LEAST):
        return f"8-bit products of [{rows}, {columns}] need multiples of {_LEAST}"
    return None


def on_cuda(weight: QuantizedWeight, bias: Tensor | None, dtype: torch.dtype) -> LinearLayer:
    """The layer by its kernel; where there is none, dequantised, which its `path` says."""
    if why_not(weight) is not None:
        return DequantizedLinear(weight, bias, dtype)
    from server.quant.low import LowLinear

    return LowLinear.of(weight, bias, dtype)


def held(weight: QuantizedWeight, dtype: torch.dtype) -> list[Tensor]:
    """Tensors on the `meta` device of the sizes of those that `on_cuda`'s layer holds."""
    form, (rows, columns) = weight.format, weight.shape
    smooth = [] if weight.input_scales is None else [_meta(columns)]
    if why_not(weight) is not None:
        return [*(smooth if form.activations != "none" else []), _meta(rows, columns, dtype=dtype)]
    if form.group_size is None:
        return [*smooth, _meta(rows, columns, dtype=torch.int8), _meta(rows)]
    if form.activations == "none":
        return [*smooth, *_words(weight)]
    pairs = -(-columns // (2 * form.group_size))
    return [*smooth, _meta(rows, pairs * form.group_size, dtype=torch.int8), _meta(2 * pairs, rows)]


def widened_bytes(weight: QuantizedWeight, dtype: torch.dtype) -> int:
    """What the layer needs for a step of many tokens beside: W in the model's `dtype`; of 4 bits with 8-bit activations
    in float32 on its way there."""
    form, (rows, columns) = weight.format, weight.shape
    if why_not(weight) is not None or (form.group_size is None and form.activations != "none"):
        return 0
    if form.weights == "int4" and form.activations == "none":
        return rows * columns * dtype.itemsize
    return rows * columns * (dtype.itemsize if form.group_size is None else 8)


def _words(weight: QuantizedWeight) -> list[Tensor]:
    """Sizes of what int4_product.pack_quads returns."""
    rows, columns = weight.shape
    tables = [table for table in (weight.scales, weight.minimums) if table is not None]
    group = weight.format.group_size or columns
    words = -(-columns // (4 * group))
    narrow = all(table.dtype.itemsize == 2 and table.dtype == tables[0].dtype for table in tables)
    dtype = tables[0].dtype if narrow else torch.float32
    return [
        _meta(rows, words * group, dtype=torch.int16),
        _meta(len(tables) * 4 * words, rows, dtype=dtype),
    ]


def _meta(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.empty(shape, dtype=dtype, device="meta")
