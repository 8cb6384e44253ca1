"""Activations to 8 bits a token at a time, in one launch with what makes them: norm (after adding to the residual
stream what products left in parts), SiLU(gate) * up, or nothing.

One program a row, so a row's bits do not depend on the batch, and its maximum is known where it is divided by. What is
quantised is first rounded to the model's dtype, as it would be for an unquantised layer: every way through a layer then
quantises the same numbers, up to the order of sums. `server.quant.formats.quantize_activations` says what q and scale
are; this computes the same bits from the same row.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

import torch
import torch.nn.functional as F
import triton
import triton.language as tl
from torch import Tensor

from server.kernels.runtime import INTERPRETED, next_power_of_2

Precision = Literal["none", "fp8", "int8"]
"""What a row becomes; "none" leaves it in the model's dtype."""

_LIMITS = {"none": 0.0, "fp8": 448.0, "int8": 127.0}
_DTYPES = {"fp8": torch.float8_e4m3fn, "int8": torch.int8}
_TRITON_DTYPES = {torch.bfloat16: tl.bfloat16, torch.float16: tl.float16, torch.float32: tl.float32}


@dataclass(frozen=True, slots=True)
class Quantized:
    """Rows of activations: `values` [M, K] of float8_e4m3fn or int8 with `scales` [M] float32, or plain without."""

    values: Tensor
    scales: Tensor | None


@dataclass(frozen=True, slots=True)
class Sums:
    """A product [M, N] whose parts are not added up yet: `parts` [P, M, N] of bfloat16, float16, float32 or int32.

    Their sum is multiplied by `row_scales` [M] and `column_scales` [N] float32 and `bias` [N] is added, where given.
    """

    parts: Tensor
    row_scales: Tensor | None = None
    column_scales: Tensor | None = None
    bias: Tensor | None = None


@triton.jit
def _to_float8_grid(v: tl.tensor) -> tl.tensor:
    """Rounds v to the nearest of float8_e4m3fn, ties to even, still float32: the interpreter's cast loses carries."""
    exponent = tl.maximum(v.to(tl.int32, bitcast=True) & 0x7F800000, 121 << 23)
    magic = (exponent + (20 << 23) + (1 << 22)).to(tl.float32, bitcast=True)
    return (v + magic) - magic


@triton.jit
def _scaled(
    total: tl.tensor, row_scale: tl.tensor, column_ptr: tl.tensor, inside: tl.tensor, COLUMNS: tl.constexpr
) -> tl.tensor:
    """`total` times a row's scale and its columns' scales."""
    total *= row_scale
    if COLUMNS:
        total *= tl.load(column_ptr, mask=inside, other=0.0).to(tl.float32)
    return total


@triton.jit
def _quantize_kernel(
    x_ptr: tl.tensor,
    rows_ptr: tl.tensor,
    parts_ptr: tl.tensor,
    row_scales_ptr: tl.tensor,
    column_scales_ptr: tl.tensor,
    bias_ptr: tl.tensor,
    norm_ptr: tl.tensor,
    smooth_ptr: tl.tensor,
    q_ptr: tl.tensor,
    scales_ptr: tl.tensor,
    x_stride: tl.tensor,
    part_stride: tl.tensor,
    eps: tl.tensor,
    WIDTH: tl.constexpr,
    BLOCK: tl.constexpr,
    PARTS: tl.constexpr,
    ROW_SCALES: tl.constexpr,
    COLUMN_SCALES: tl.constexpr,
    BIAS: tl.constexpr,
    SILU: tl.constexpr,
    NORM: tl.constexpr,
    SMOOTH: tl.constexpr,
    GATHER: tl.constexpr,
    LIMIT: tl.constexpr,
    FLOAT8: tl.constexpr,
    INTERPRETED: tl.constexpr,
    DTYPE: tl.constexpr,
    PDL: tl.constexpr,
) -> None:
    """Without SILU: row `row` of x plus PARTS parts; with it x is [., 2 WIDTH], scaled as parts would be."""
    row = tl.program_id(0).to(tl.int64)
    k = tl.arange(0, BLOCK)
    inside = k < WIDTH
    if PDL:
        tl.extra.cuda.gdc_launch_dependents()
    norm, smooth = 1.0, 1.0
    if NORM:
        norm = tl.load(norm_ptr + k, mask=inside, other=0.0).to(tl.float32)
    if SMOOTH:
        smooth = tl.load(smooth_ptr + k, mask=inside, other=0.0).to(tl.float32)
    if PDL:
        tl.extra.cuda.gdc_wait()
    line = row
    if GATHER:
        line = tl.load(rows_ptr + row)
    row_scale = 1.0
    if ROW_SCALES:
        row_scale = tl.load(row_scales_ptr + row)
    at = x_ptr + line * x_stride + k
    if SILU:
        gate = tl.load(at, mask=inside, other=0.0).to(tl.float32)
        up = tl.load(at + WIDTH, mask=inside, other=0.0).to(tl.float32)
        gate = _scaled(gate, row_scale, column_scales_ptr + k, inside, COLUMN_SCALES)
        up = _scaled(up, row_scale, column_scales_ptr + WIDTH + k, inside, COLUMN_SCALES)
        if BIAS:
            gate += tl.load(bias_ptr + k, mask=inside, other=0.0).to(tl.float32)
            up += tl.load(bias_ptr + WIDTH + k, mask=inside, other=0.0).to(tl.float32)
        v = (gate / (1.0 + tl.exp(-gate)) * up).to(DTYPE).to(tl.float32)
    else:
        v = tl.load(at, mask=inside, other=0.0).to(tl.float32)
    if PARTS > 0:
        part_at = parts_ptr + row * WIDTH + k
        total = tl.load(part_at, mask=inside, other=0.0).to(tl.float32)
        for part in tl.static_range(1, PARTS):
            total += tl.load(part_at + part * part_stride, mask=inside, other=0.0).to(tl.float32)
        total = _scaled(total, row_scale, column_scales_ptr + k, inside, COLUMN_SCALES)
        if BIAS:
            total += tl.load(bias_ptr + k, mask=inside, other=0.0).to(tl.float32)
        x = (v + total).to(DTYPE)
        tl.store(at, x, mask=inside)
        v = x.to(tl.float32)
    if NORM:
        v = (v * tl.rsqrt(tl.sum(v * v, axis=0) / WIDTH + eps) * norm).to(DTYPE).to(tl.float32)
    v *= smooth
    if LIMIT > 0:
        scale = tl.div_rn(tl.max(tl.abs(v), axis=0), LIMIT)
        tl.store(scales_ptr + row, scale)
        v = tl.div_rn(v, tl.where(scale > 0, scale, 1.0))
        if not FLOAT8:  # to the nearest integer, ties to even: beside 1.5 * 2^23 float32 has no fractions
            v = (v + 12582912.0) - 12582912.0
        elif INTERPRETED:
            v = _to_float8_grid(v)
    tl.store(q_ptr + row * WIDTH + k, v.to(q_ptr.dtype.element_ty), mask=inside)


def _launch(
    x: Tensor,
    width: int,
    precision: Precision,
    *,
    sums: Sums | None = None,
    norm: Tensor | None = None,
    eps: float = 0.0,
    smooth: Tensor | None = None,
    rows: Tensor | None = None,
    silu: bool = False,
    dtype: torch.dtype | None = None,
    pdl: bool = False,
) -> Quantized:
    num_rows = len(x) if rows is None else len(rows)
    dtype = dtype or x.dtype
    values = torch.empty(num_rows, width, dtype=_DTYPES.get(precision, dtype), device=x.device)
    scales = torch.empty(num_rows, dtype=torch.float32, device=x.device) if precision != "none" else None
    if num_rows == 0:
        return Quantized(values, scales)
    made = sums or Sums(x)
    block = next_power_of_2(width)

    def given(tensor: Tensor | None) -> Tensor:
        return x if tensor is None else tensor

    options: dict[str, Any] = {"launch_pdl": True} if pdl else {}
    _quantize_kernel[(num_rows,)](
        x, given(rows), made.parts, given(made.row_scales), given(made.column_scales), given(made.bias), given(norm),
        given(smooth), values, given(scales), x.stride(0), made.parts.stride(0), eps,
        WIDTH=width, BLOCK=block, PARTS=0 if silu or sums is None else len(made.parts),
        ROW_SCALES=made.row_scales is not None, COLUMN_SCALES=made.column_scales is not None,
        BIAS=made.bias is not None, SILU=silu, NORM=norm is not None, SMOOTH=smooth is not None,
        GATHER=rows is not None, LIMIT=_LIMITS[precision], FLOAT8=precision == "fp8", INTERPRETED=INTERPRETED,
        DTYPE=_TRITON_DTYPES[dtype], PDL=pdl, num_warps=min(max(block // 512, 1), 16), **options,
    )  # fmt: skip
    return Quantized(values, scales)


def quantize(x: Tensor, precision: Precision, smooth: Tensor | None = None, *, pdl: bool = False) -> Quantized:
    """Rows of x [M, K], times `smooth` [K] if it is given; K contiguous."""
    return _launch(x, x.shape[1], precision, smooth=smooth, pdl=pdl)


def norm_quantize(
    x: Tensor,
    norm: Tensor,
    eps: float,
    precision: Precision,
    smooth: Tensor | None = None,
    *,
    rows: Tensor | None = None,
    pdl: bool = False,
) -> Quantized:
    """RMSNorm of rows of x [M, H] with weights `norm` [H], quantised; `rows` [T] int64 (None: all) are taken."""
    return _launch(x, x.shape[1], precision, norm=norm, eps=eps, smooth=smooth, rows=rows, pdl=pdl)


def add_norm_quantize_(
    x: Tensor,
    delta: Sums,
    norm: Tensor,
    eps: float,
    precision: Precision,
    smooth: Tensor | None = None,
    *,
    pdl: bool = False,
) -> Quantized:
    """Adds delta to x [M, H] in place, rounded once, and returns the sum's RMSNorm, quantised. All contiguous."""
    return _launch(x, x.shape[1], precision, sums=delta, norm=norm, eps=eps, smooth=smooth, pdl=pdl)


def silu_mul_quantize(
    gate_up: Sums, precision: Precision, dtype: torch.dtype, smooth: Tensor | None = None, *, pdl: bool = False
) -> Quantized:
    """SiLU(gate) * up, rounded to `dtype` and quantised, of a product [1, M, 2 I] in one part, gates first."""
    x = gate_up.parts[0]
    return _launch(x, x.shape[1] // 2, precision, sums=gate_up, silu=True, dtype=dtype, smooth=smooth, pdl=pdl)


def total_reference(sums: Sums) -> Tensor:
    """The product [M, N] float32 that `sums` stands for."""
    total = sums.parts.float().sum(0)
    if sums.row_scales is not None:
        total = total * sums.row_scales[:, None]
    if sums.column_scales is not None:
        total = total * sums.column_scales.float()
    return total if sums.bias is None else total + sums.bias.float()


def quantize_reference(x: Tensor, precision: Precision, smooth: Tensor | None = None) -> Quantized:
    """`quantize` in torch operations."""
    wide = x.float() if smooth is None else x.float() * smooth.float()
    if precision == "none":
        return Quantized(wide.to(x.dtype), None)
    scales = wide.abs().amax(1) / _LIMITS[precision]
    q = wide / torch.where(scales > 0, scales, 1.0)[:, None]
    return Quantized(q.to(_DTYPES[precision]) if precision == "fp8" else q.round().to(torch.int8), scales)


def norm_quantize_reference(
    x: Tensor, norm: Tensor, eps: float, precision: Precision, smooth: Tensor | None = None
) -> Quantized:
    """`norm_quantize` of all rows in torch operations."""
    normed = F.rms_norm(x.float(), (x.shape[1],), norm.float(), eps).to(x.dtype)
    return quantize_reference(normed, precision, smooth)


def silu_mul_quantize_reference(
    gate_up: Sums, precision: Precision, dtype: torch.dtype, smooth: Tensor | None = None
) -> Quantized:
    """`silu_mul_quantize` in torch operations."""
    gate, up = total_reference(gate_up).chunk(2, dim=-1)
    return quantize_reference((F.silu(gate) * up).to(dtype), precision, smooth)
