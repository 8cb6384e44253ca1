"""Low-precision linear layers for a few tokens (M <= 64): plain ones, in parts, and the MLP's gated half."""

from __future__ import annotations

import torch
import torch.nn.functional as F
import triton
import triton.language as tl
from torch import Tensor

from server.kernels.eightbit_product import grouped_product, product
from server.kernels.eightbit_tiles import EightTile, Weight, candidates, constants
from server.kernels.int4_product import quad_product
from server.kernels.quantize import Quantized, Sums
from server.kernels.runtime import ceil_div
from server.kernels.skinny_product import ahead, prefetch_rows, w_rows
from server.kernels.skinny_tiles import Kind


@triton.jit
def prepared(
    w_ptr: tl.tensor,
    first: tl.tensor,
    begin: tl.tensor,
    N: tl.constexpr,
    K: tl.constexpr,
    STRIDE: tl.constexpr,
    GROUP: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK_K: tl.constexpr,
    TAIL: tl.constexpr,
    SPLIT: tl.constexpr,
    PAIR: tl.constexpr,
    PREFETCH: tl.constexpr,
    THREADS: tl.constexpr,
    PDL: tl.constexpr,
) -> tl.tensor:
    """What needs no other kernel (skinny_product.ahead), for a program whose K begins at `begin`."""
    if GROUP == 0:
        w, tail = ahead(w_ptr + begin, first, N, K, ROWS, BLOCK_K, TAIL, SPLIT, PAIR, PREFETCH, THREADS, PDL)
    else:
        w, tail = w_ptr, w_ptr
        if PDL:
            tl.extra.cuda.gdc_launch_dependents()
            if PREFETCH > 0:
                PER: tl.constexpr = 4 if w_ptr.dtype.element_ty == tl.int16 else 2
                prefetch_rows(w_ptr + begin // PER, first, N, STRIDE, ROWS, PAIR, PREFETCH, THREADS)
    return w, tail


@triton.jit
def scaled_product(
    x_ptr: tl.tensor,
    row_scales_ptr: tl.tensor,
    w_ptr: tl.tensor,
    column_scales_ptr: tl.tensor,
    w: tl.tensor,
    tail: tl.tensor,
    present: tl.tensor,
    first: tl.tensor,
    begin: tl.tensor,
    N: tl.constexpr,
    K: tl.constexpr,
    STRIDE: tl.constexpr,
    GROUP: tl.constexpr,
    MINIMUM: tl.constexpr,
    BLOCK_M: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK_K: tl.constexpr,
    TAIL: tl.constexpr,
    SHARE: tl.constexpr,
    SPLIT: tl.constexpr,
    PAIR: tl.constexpr,
    SWAP: tl.constexpr,
    ROW_SCALES: tl.constexpr,
    PRECISION: tl.constexpr,
    PACKED: tl.constexpr,
) -> tl.tensor:
    """Product x Wᵀ [BLOCK_M, ROWS] float32 with all scales in it."""
    if GROUP == 0:
        column = tl.load(column_scales_ptr + w_rows(tl.arange(0, ROWS), first, N, PAIR))[None, :]
        acc = product(
            x_ptr, present, w, tail, first, begin,
            N, K, BLOCK_M, ROWS, BLOCK_K, TAIL, SHARE, SPLIT, PAIR, SWAP, PRECISION,
        )  # fmt: skip
        acc *= column
    elif w_ptr.dtype.element_ty == tl.int16:
        acc = quad_product(
            x_ptr, present, w_ptr, column_scales_ptr, first, begin,
            N, K, STRIDE, GROUP, MINIMUM, BLOCK_M, ROWS, SHARE, PAIR, SWAP, PRECISION, PACKED,
        )  # fmt: skip
    else:
        acc = grouped_product(
            x_ptr, present, w_ptr, column_scales_ptr, first, begin,
            N, K, STRIDE, GROUP, BLOCK_M, ROWS, SHARE, PAIR, SWAP, PACKED,
        )  # fmt: skip
    if ROW_SCALES:
        acc *= tl.load(row_scales_ptr + tl.arange(0, BLOCK_M), mask=present, other=0.0)[:, None]
    return acc


@triton.jit(do_not_specialize=["M"])
def _linear_kernel(
    x_ptr: tl.tensor,
    row_scales_ptr: tl.tensor,
    w_ptr: tl.tensor,
    column_scales_ptr: tl.tensor,
    bias_ptr: tl.tensor,
    out_ptr: tl.tensor,
    M: tl.tensor,
    N: tl.constexpr,
    BIAS: tl.constexpr,
    K: tl.constexpr,
    STRIDE: tl.constexpr,
    GROUP: tl.constexpr,
    MINIMUM: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    TAIL: tl.constexpr,
    SHARE: tl.constexpr,
    SPLIT: tl.constexpr,
    SWAP: tl.constexpr,
    ROW_SCALES: tl.constexpr,
    PRECISION: tl.constexpr,
    PACKED: tl.constexpr,
    PREFETCH: tl.constexpr,
    THREADS: tl.constexpr,
    PDL: tl.constexpr,
) -> None:
    """Writes this program's part of x Wᵀ, with bias, to out [parts, M, N]."""
    first = tl.program_id(0) * BLOCK_N
    part = tl.program_id(1)
    begin = part * SHARE
    n = first + tl.arange(0, BLOCK_N)
    w, tail = prepared(
        w_ptr, first, begin,
        N, K, STRIDE, GROUP, BLOCK_N, BLOCK_K, TAIL, SPLIT, False, PREFETCH, THREADS, PDL,
    )  # fmt: skip
    m = tl.arange(0, BLOCK_M)
    present = m < M
    if PDL:
        tl.extra.cuda.gdc_wait()
    acc = scaled_product(
        x_ptr, row_scales_ptr, w_ptr, column_scales_ptr, w, tail, present, first, begin,
        N, K, STRIDE, GROUP, MINIMUM, BLOCK_M, BLOCK_N, BLOCK_K, TAIL, SHARE, SPLIT, False, SWAP, ROW_SCALES, PRECISION,
        PACKED,
    )  # fmt: skip
    if BIAS:
        acc += tl.load(bias_ptr + n, mask=n < N, other=0.0).to(tl.float32)[None, :]
    at = out_ptr + (part * M + m).to(tl.int64)[:, None] * N + n[None, :]
    tl.store(at, acc.to(out_ptr.dtype.element_ty), mask=present[:, None] & (n < N)[None, :])


@triton.jit(do_not_specialize=["M"])
def _gate_up_kernel(
    x_ptr: tl.tensor,
    row_scales_ptr: tl.tensor,
    w_ptr: tl.tensor,
    column_scales_ptr: tl.tensor,
    bias_ptr: tl.tensor,
    out_ptr: tl.tensor,
    M: tl.tensor,
    N: tl.constexpr,
    BIAS: tl.constexpr,
    K: tl.constexpr,
    STRIDE: tl.constexpr,
    GROUP: tl.constexpr,
    MINIMUM: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    TAIL: tl.constexpr,
    SHARE: tl.constexpr,
    SPLIT: tl.constexpr,
    SWAP: tl.constexpr,
    ROW_SCALES: tl.constexpr,
    PRECISION: tl.constexpr,
    PACKED: tl.constexpr,
    PREFETCH: tl.constexpr,
    THREADS: tl.constexpr,
    PDL: tl.constexpr,
) -> None:
    """Rows of gate and of up alternate in a program's tile, so that a gate and its up meet in one thread."""
    first = tl.program_id(0) * BLOCK_N
    n = first + tl.arange(0, BLOCK_N)
    w, tail = prepared(
        w_ptr, first, 0,
        N, K, STRIDE, GROUP, 2 * BLOCK_N, BLOCK_K, TAIL, SPLIT, True, PREFETCH, THREADS, PDL,
    )  # fmt: skip
    m = tl.arange(0, BLOCK_M)
    present = m < M
    if PDL:
        tl.extra.cuda.gdc_wait()
    acc = scaled_product(
        x_ptr, row_scales_ptr, w_ptr, column_scales_ptr, w, tail, present, first, 0,
        N, K, STRIDE, GROUP, MINIMUM, BLOCK_M, 2 * BLOCK_N, BLOCK_K, TAIL, SHARE, SPLIT, True, SWAP, ROW_SCALES,
        PRECISION, PACKED,
    )  # fmt: skip
    if BIAS:
        acc += tl.load(bias_ptr + w_rows(tl.arange(0, 2 * BLOCK_N), first, N, True)).to(tl.float32)[None, :]
    gate, up = tl.split(tl.reshape(acc, [BLOCK_M, BLOCK_N, 2]))
    mixed = gate / (1.0 + tl.exp(-gate)) * up
    at = out_ptr + m.to(tl.int64)[:, None] * N + n[None, :]
    tl.store(at, mixed.to(out_ptr.dtype.element_ty), mask=present[:, None] & (n < N)[None, :])


def linear8(
    x: Quantized,
    weight: Weight,
    dtype: torch.dtype,
    bias: Tensor | None = None,
    *,
    tile: EightTile | None = None,
    pdl: bool = False,
) -> Tensor:
    """Maps x to x Wᵀ + bias, [M, N] of `dtype`, M <= 64: the head, and projections without a fused epilogue.

    x [M, K] quantised as the weights' format says (plain: of `dtype`). Raises ValueError if M is too large, or a tile
    of more than one part is asked for.
    """
    size = x.values.element_size()
    tile = tile or candidates(Kind.HEAD, len(x.values), weight.rows, weight.columns, size, weight.group, weight.per)[0]
    if tile.parts != 1:
        raise ValueError(f"tile {tile.name}: a result that is rounded cannot come in parts")
    out = torch.empty(1, len(x.values), weight.rows, dtype=dtype, device=x.values.device)
    return _linear(x, weight, out, bias, tile, pdl)[0]


def linear8_parts(
    x: Quantized, weight: Weight, bias: Tensor | None = None, *, tile: EightTile | None = None, pdl: bool = False
) -> Sums:
    """The same as float32 sums in `tile.parts` parts, for quantize.add_norm_quantize_, which adds `bias` too."""
    size = x.values.element_size()
    tile = (
        tile or candidates(Kind.RESIDUAL, len(x.values), weight.rows, weight.columns, size, weight.group, weight.per)[0]
    )
    out = torch.empty(tile.parts, len(x.values), weight.rows, dtype=torch.float32, device=x.values.device)
    return Sums(_linear(x, weight, out, None, tile, pdl), bias=bias)


def _linear(x: Quantized, weight: Weight, out: Tensor, bias: Tensor | None, tile: EightTile, pdl: bool) -> Tensor:
    _linear_kernel[(ceil_div(weight.rows, tile.block_n), tile.parts)](
        x.values,
        x.values if x.scales is None else x.scales,
        weight.values,
        weight.scales,
        x.values if bias is None else bias,
        out,
        len(x.values),
        N=weight.rows,
        BIAS=bias is not None,
        **constants(tile, x.values, weight, len(x.values), pdl),
    )
    return out


def gate_up8(
    x: Quantized,
    weight: Weight,
    dtype: torch.dtype,
    bias: Tensor | None = None,
    *,
    tile: EightTile | None = None,
    pdl: bool = False,
) -> Tensor:
    """silu(g) * u -> [M, I] of `dtype` where (g, u) [M, I] each are x Wᵀ + bias; W [2 I, K], gate's rows first."""
    num_tokens, columns = len(x.values), weight.rows // 2
    out = torch.empty(num_tokens, columns, dtype=dtype, device=x.values.device)
    size = x.values.element_size()
    tile = tile or candidates(Kind.GATE_UP, num_tokens, columns, weight.columns, size, weight.group, weight.per)[0]
    _gate_up_kernel[(ceil_div(columns, tile.block_n),)](
        x.values,
        x.values if x.scales is None else x.scales,
        weight.values,
        weight.scales,
        x.values if bias is None else bias,
        out,
        num_tokens,
        N=columns,
        BIAS=bias is not None,
        **constants(tile, x.values, weight, num_tokens, pdl),
    )
    return out


def linear8_reference(x: Quantized, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """Product x Wᵀ + bias, float32 [M, N], for the dequantised weight [N, K] float32."""
    wide = x.values.float() if x.scales is None else x.values.float() * x.scales[:, None]
    return F.linear(wide, weight, None if bias is None else bias.float())


def gate_up8_reference(x: Quantized, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """silu(g) * u, float32 [M, I], for the dequantised weight [2 I, K] float32."""
    gate, up = linear8_reference(x, weight, bias).chunk(2, dim=-1)
    return F.silu(gate) * up
