"""Low-precision products of many tokens: torch's 8-bit matrix products, with the scales where they cost least.

The same function as the skinny kernels up to the order of sums: the same q and the same scales, applied to the sums.
float8 goes to `torch._scaled_mm` row by column, which at these sizes is as fast as one scale for all (1.43 PFLOP/s at
8,192 cubed on an H100). int8 goes to `torch._int_mm`, whose int32 sums whoever reads them next scales (quantize.py).
Weights that meet activations of the model's dtype are cast to it, which is exact; only 4-bit ones are multiplied by
their groups' scales first and rounded.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
import triton
import triton.language as tl
from torch import Tensor

from server.kernels.eightbit_tiles import Weight
from server.kernels.int4_product import WORD, unpacked
from server.kernels.quantize import Quantized, Sums
from server.kernels.runtime import ceil_div, next_power_of_2, pdl_options

_BLOCK = 1024
_LEAST_ROWS = 17
"""`torch._int_mm` takes more than 16 rows on CUDA."""


@triton.jit
def _total_kernel(
    parts_ptr: tl.tensor,
    row_scales_ptr: tl.tensor,
    column_scales_ptr: tl.tensor,
    bias_ptr: tl.tensor,
    out_ptr: tl.tensor,
    WIDTH: tl.constexpr,
    BLOCK: tl.constexpr,
    ROW_SCALES: tl.constexpr,
    COLUMN_SCALES: tl.constexpr,
    BIAS: tl.constexpr,
    PDL: tl.constexpr,
) -> None:
    row = tl.program_id(0).to(tl.int64)
    n = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = n < WIDTH
    if PDL:
        tl.extra.cuda.gdc_wait()
        tl.extra.cuda.gdc_launch_dependents()
    total = tl.load(parts_ptr + row * WIDTH + n, mask=inside, other=0.0).to(tl.float32)
    if ROW_SCALES:
        total *= tl.load(row_scales_ptr + row)
    if COLUMN_SCALES:
        total *= tl.load(column_scales_ptr + n, mask=inside, other=0.0).to(tl.float32)
    if BIAS:
        total += tl.load(bias_ptr + n, mask=inside, other=0.0).to(tl.float32)
    tl.store(out_ptr + row * WIDTH + n, total.to(out_ptr.dtype.element_ty), mask=inside)


def large_parts(x: Quantized, weight: Weight, dtype: torch.dtype, bias: Tensor | None = None) -> Sums:
    """Product x Wᵀ + bias [1, M, N] of any number of tokens, scales not all applied; x [M, K] of `dtype` if plain."""
    values, scales = x.values, x.scales
    if weight.per == WORD:
        return Sums(F.linear(values, plain_words(weight, values.dtype))[None], None, None, bias)
    if weight.group:
        wide = torch.bfloat16 if dtype == torch.bfloat16 else torch.float32
        product = F.linear(values.to(wide), dequantized_groups(weight, values.dtype).to(wide))
        return Sums(product[None], scales, None, bias)
    if scales is None:
        return Sums(F.linear(values, weight.values.to(values.dtype))[None], None, weight.scales, bias)
    if values.dtype == torch.int8:
        return Sums(_int8(values, weight.values)[None], scales, weight.scales, bias)
    if not values.is_cuda:
        return Sums(F.linear(values.float(), weight.values.float())[None], scales, weight.scales, bias)
    if dtype == torch.bfloat16:
        rows, columns = scales[:, None], weight.scales[None, :]
        product = torch._scaled_mm(values, weight.values.t(), rows, columns, out_dtype=dtype, use_fast_accum=True)
        return Sums(product[None], None, None, bias)
    one = torch.ones((), device=values.device)
    product = torch._scaled_mm(values, weight.values.t(), one, one, out_dtype=torch.float32)
    return Sums(product[None], scales, weight.scales, bias)


def _int8(x: Tensor, weight: Tensor) -> Tensor:
    missing = max(0, _LEAST_ROWS - len(x))
    return torch._int_mm(F.pad(x, (0, 0, 0, missing)) if missing else x, weight.t())[: len(x)]


def dequantized_groups(weight: Weight, activations: torch.dtype) -> Tensor:
    """W [N, K] float32 of 4-bit weights, for rows of x of this dtype (eightbit_product.pack_groups)."""
    low, high = weight.values << 4, weight.values & -16
    factor = 1.0
    if activations != torch.int8:
        low, high = (weight.values & 15) - 8, ((weight.values >> 4) & 15) - 8
        factor = 1 / 512
    pairs = torch.stack([part.view(weight.rows, -1, weight.group) for part in (low, high)], dim=2).float()
    scales = weight.scales.t().reshape(weight.rows, -1, 2, 1) * factor
    return (pairs * scales).flatten(1)[:, : weight.columns]


def plain_words(weight: Weight, dtype: torch.dtype) -> Tensor:
    """W [N, K] of `dtype`, of words (int4_product.pack_quads)."""
    w = weight
    return unpacked(w.values, w.scales, w.columns, w.group, dtype, minimum=w.minimum)


def total(sums: Sums, dtype: torch.dtype) -> Tensor:
    """The product [M, N] of `dtype` that a result of one part stands for."""
    plain = sums.row_scales is None and sums.column_scales is None and sums.bias is None
    (_, num_rows, width), source = sums.parts.shape, sums.parts[0]
    if plain and source.dtype == dtype:
        return source
    out = torch.empty(num_rows, width, dtype=dtype, device=source.device)
    if num_rows == 0:
        return out
    block = min(next_power_of_2(width), _BLOCK)

    def given(tensor: Tensor | None) -> Tensor:
        return source if tensor is None else tensor

    _total_kernel[(num_rows, ceil_div(width, block))](
        source, given(sums.row_scales), given(sums.column_scales), given(sums.bias), out,
        WIDTH=width, BLOCK=block, ROW_SCALES=sums.row_scales is not None,
        COLUMN_SCALES=sums.column_scales is not None, BIAS=sums.bias is not None,
        num_warps=4, **pdl_options(source.device),
    )  # fmt: skip
    return out
