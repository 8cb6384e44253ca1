"""Activations to groups of 8-bit integers, bit for bit as `server.quant.formats.quantize_activations` makes them.

Of a row [K]: q int8 [K], and for each group of 32 twelve bytes: scale (float32), scale times the sum of its q
(float32), the sum (int32).
"""

from __future__ import annotations

from typing import Any

import numpy as np
from llvmlite import ir
from numba.core import cgutils, types

from server.quant.cpu.vectors import F32, I8, I32, I64, Emitter, addresses, jit, kernel

GROUP = 32
"""Columns that share a scale."""
SCALE_BYTES = 12
"""What a group has beside its values."""
_WIDE = ir.VectorType(F32, GROUP)


def _quantize(e: Emitter, v: ir.Value, q: ir.Value, scales: ir.Value) -> None:
    """Stores v [32] as integers at `q` and its scale and sums at `scales`."""
    b = e.b
    largest = e.reduce(e.unary("fabs", v), _maximum(e))
    scale = b.fdiv(largest, F32(127.0))
    divisor = b.select(b.fcmp_ordered(">", scale, F32(0.0)), scale, F32(1.0))
    rounded = e.unary("roundeven", b.fdiv(v, e.splat(divisor, GROUP)))
    numbers = b.fptosi(rounded, ir.VectorType(I32, GROUP))
    e.store(b.trunc(numbers, ir.VectorType(I8, GROUP)), q)
    total = e.reduce(numbers, b.add)
    e.store(scale, scales)
    e.store(b.fmul(scale, b.sitofp(total, F32)), scales, 4)
    e.store(total, scales, 8)


def _maximum(e: Emitter) -> Any:
    return lambda x, y: e.maximum(x, y)


@kernel(addresses(3))
def quantize_group(e: Emitter, x: ir.Value, q: ir.Value, scales: ir.Value) -> None:
    """X [32] float32."""
    _quantize(e, e.load(x, 0, _WIDE), q, scales)


@kernel((*addresses(4), types.float32))
def quantize_normed(
    e: Emitter, x: ir.Value, weight: ir.Value, q: ir.Value, scales: ir.Value, inverse: ir.Value
) -> None:
    """X [32] * inverse * weight [32]: a group of a root-mean-square norm."""
    scaled = e.b.fmul(e.load(x, 0, _WIDE), e.splat(inverse, GROUP))
    _quantize(e, e.b.fmul(scaled, e.load(weight, 0, _WIDE)), q, scales)


@kernel(addresses(4))
def quantize_gated(e: Emitter, gate: ir.Value, up: ir.Value, q: ir.Value, scales: ir.Value) -> None:
    """silu(gate [32]) * up [32]."""
    b, g = e.b, e.load(gate, 0, _WIDE)
    one, bound = e.full(F32, GROUP, 1.0), e.full(F32, GROUP, 88.0)
    negative = b.fneg(g)
    negative = b.select(b.fcmp_ordered(">", negative, bound), bound, negative)  # exp would not fit; NaN passes
    silu = b.fdiv(g, b.fadd(one, e.exp(negative)))
    _quantize(e, b.fmul(silu, e.load(up, 0, _WIDE)), q, scales)


@kernel(addresses(2), types.float32)
def sum_of_squares(e: Emitter, x: ir.Value, groups: ir.Value) -> ir.Value:
    """Of x [32 * groups] float32."""
    total = e.variable(e.full(F32, GROUP, 0.0))
    with cgutils.for_range(e.b, groups) as loop:
        v = e.load(x, e.b.mul(loop.index, I64(GROUP * 4)), _WIDE)
        e.b.store(e.fma(v, v, e.b.load(total)), total)
    return e.reduce(e.b.load(total), e.b.fadd)


@jit
def inverse_rms(x, groups, eps):
    """1 / sqrt(mean(x²) + eps) of a row."""
    mean = sum_of_squares(x, groups) / np.float32(groups * 32)
    return np.float32(1.0) / np.sqrt(mean + np.float32(eps))


@jit
def quantize_rows(x, stride, groups, q, scales, first, end):
    """Groups `first` to `end`, counted through all rows, of rows that lie `stride` bytes apart."""
    for at in range(first, end):
        row, group = at // groups, at % groups
        quantize_group(x + row * stride + group * 128, q + at * 32, scales + at * 12)


@jit
def quantize_normed_rows(x, stride, weight, eps, groups, q, scales, first, end):
    """Likewise of normed rows; a row's length is found by whoever has part of it."""
    row, inverse = -1, np.float32(0.0)
    for at in range(first, end):
        group = at % groups
        if at // groups != row:
            row = at // groups
            inverse = inverse_rms(x + row * stride, groups, eps)
        quantize_normed(x + row * stride + group * 128, weight + group * 128, q + at * 32, scales + at * 12, inverse)


@jit
def quantize_gated_rows(x, groups, q, scales, first, end):
    """Likewise of silu(gate) * up, where a row of x is gate and then up."""
    for at in range(first, end):
        gate = x + at // groups * groups * 256 + at % groups * 128
        quantize_gated(gate, gate + groups * 128, q + at * 32, scales + at * 12)
