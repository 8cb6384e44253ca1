"""Linear layers for a few tokens (M <= 64): the residual stream's, whose next norm is prepared too, and the head.

The layer's others are in skinny_qkv.py (with rotary embedding and the write to the pool) and skinny_mlp.py (gate and
up). How the product is computed: skinny_product.py; the norm: skinny_scaled.py; what tiles there are: skinny_tiles.py.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
import triton
import triton.language as tl
from torch import Tensor

from server.kernels.runtime import ceil_div
from server.kernels.skinny_product import ahead, product
from server.kernels.skinny_scaled import Scaled, inverse_rms, least_columns, load_squares, store_squares
from server.kernels.skinny_tiles import Kind, TileConfig, block_m, check_tokens, configs_for, constants


@triton.jit(do_not_specialize=["M"])
def _residual_kernel(
    x_ptr: tl.tensor,
    w_ptr: tl.tensor,
    bias_ptr: tl.tensor,
    out_ptr: tl.tensor,
    norm_ptr: tl.tensor,
    scaled_ptr: tl.tensor,
    squares_ptr: tl.tensor,
    M: tl.tensor,
    N: tl.constexpr,
    K: tl.constexpr,
    BIAS: tl.constexpr,
    SCALED: tl.constexpr,
    PARTS: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    TAIL: tl.constexpr,
    SPLIT: tl.constexpr,
    PRESCALE: tl.constexpr,
    PRECISION: tl.constexpr,
    PREFETCH: tl.constexpr,
    THREADS: tl.constexpr,
    PDL: tl.constexpr,
) -> None:
    """Adds x Wᵀ to out [M, N]; with SCALED writes what the norm after it needs too."""
    first = tl.program_id(0) * BLOCK_N
    n = first + tl.arange(0, BLOCK_N)
    w, tail = ahead(w_ptr, first, N, K, BLOCK_N, BLOCK_K, TAIL, SPLIT, False, PREFETCH, THREADS, PDL)
    m = tl.arange(0, BLOCK_M)
    present = m < M
    bias, norm = 0.0, 0.0
    if BIAS:
        bias = tl.load(bias_ptr + n, mask=n < N, other=0.0).to(tl.float32)[None, :]
    if SCALED:
        norm = tl.load(norm_ptr + n, mask=n < N, other=0.0).to(tl.float32)[None, :] * PRESCALE
    offsets = m.to(tl.int64)[:, None] * N + n[None, :]
    stored = present[:, None] & (n < N)[None, :]
    if PDL:
        tl.extra.cuda.gdc_wait()
    before = tl.load(out_ptr + offsets, mask=stored, other=0.0)
    acc = product(
        x_ptr, m.to(tl.int64), present, w, tail, first,
        N, K, BLOCK_M, BLOCK_N, BLOCK_K, TAIL, SPLIT, False, PRECISION,
    )  # fmt: skip
    after = (before.to(tl.float32) + (acc + bias)).to(out_ptr.dtype.element_ty)
    tl.store(out_ptr + offsets, after, mask=stored)
    if SCALED:
        wide = tl.where(stored, after.to(tl.float32), 0.0)
        tl.store(scaled_ptr + offsets, (wide * norm).to(scaled_ptr.dtype.element_ty), mask=stored)
        PROGRAMS: tl.constexpr = (N + BLOCK_N - 1) // BLOCK_N
        store_squares(squares_ptr, m, present, tl.sum(wide * wide, axis=1), PARTS, PROGRAMS)


@triton.jit(do_not_specialize=["M"])
def _linear_kernel(
    x_ptr: tl.tensor,
    squares_ptr: tl.tensor,
    rows_ptr: tl.tensor,
    eps: tl.tensor,
    w_ptr: tl.tensor,
    bias_ptr: tl.tensor,
    out_ptr: tl.tensor,
    M: tl.tensor,
    N: tl.constexpr,
    K: tl.constexpr,
    GATHER: tl.constexpr,
    BIAS: tl.constexpr,
    SETTLED: tl.constexpr,
    PARTS: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    TAIL: tl.constexpr,
    SPLIT: tl.constexpr,
    PRESCALE: tl.constexpr,
    PRECISION: tl.constexpr,
    PREFETCH: tl.constexpr,
    THREADS: tl.constexpr,
    PDL: tl.constexpr,
) -> None:
    """Writes x[rows] Wᵀ / rms + bias to out [M, N]."""
    first = tl.program_id(0) * BLOCK_N
    n = first + tl.arange(0, BLOCK_N)
    w, tail = ahead(w_ptr, first, N, K, BLOCK_N, BLOCK_K, TAIL, SPLIT, False, PREFETCH, THREADS, PDL)
    m = tl.arange(0, BLOCK_M)
    present = m < M
    row = m.to(tl.int64)
    if PDL and not SETTLED:
        tl.extra.cuda.gdc_wait()
    if GATHER:
        row = tl.load(rows_ptr + m, mask=present, other=0)
    if PDL and SETTLED:
        tl.extra.cuda.gdc_wait()
    squares = load_squares(squares_ptr, row, present, PARTS, BLOCK_M)
    acc = product(
        x_ptr, row, present, w, tail, first,
        N, K, BLOCK_M, BLOCK_N, BLOCK_K, TAIL, SPLIT, False, PRECISION,
    )  # fmt: skip
    acc *= inverse_rms(squares, eps, K, PRESCALE)
    if BIAS:
        acc += tl.load(bias_ptr + n, mask=n < N, other=0.0).to(tl.float32)[None, :]
    at = out_ptr + m.to(tl.int64)[:, None] * N + n[None, :]
    tl.store(at, acc.to(out_ptr.dtype.element_ty), mask=present[:, None] & (n < N)[None, :])


def linear_residual_(
    residual: Tensor,
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    *,
    config: TileConfig | None = None,
    pdl: bool = False,
) -> Tensor:
    """`residual` [M, N] += x [M, K] Wᵀ + bias in place, M <= 64; W [N, K], all contiguous and of one dtype.

    The sum is rounded once. Returns `residual`. Raises ValueError if M is too large.
    """
    _add(residual, x, weight, bias, None, None, config, pdl)
    return residual


def linear_residual_scaled_(
    residual: Tensor,
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    norm: Tensor,
    scaled: Scaled,
    *,
    config: TileConfig | None = None,
    pdl: bool = False,
) -> None:
    """As linear_residual_, and fills `scaled`'s tensors from the rounded sum for the norm [N] that follows.

    Raises ValueError if M is too large, or the tile so narrow that there are more programs than columns for squares.
    """
    _add(residual, x, weight, bias, norm, scaled, config, pdl)


def _add(
    residual: Tensor,
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    norm: Tensor | None,
    scaled: Scaled | None,
    config: TileConfig | None,
    pdl: bool,
) -> None:
    num_tokens, (n, k) = x.shape[0], weight.shape
    check_tokens(num_tokens)
    config = config or configs_for(Kind.RESIDUAL, num_tokens, n, k, x.element_size())[0]
    if scaled is not None and config.block_n < least_columns(n):
        raise ValueError(f"a tile of {config.block_n} columns where {n} need {least_columns(n)} at least")
    _residual_kernel[(ceil_div(n, config.block_n),)](
        x,
        weight,
        x if bias is None else bias,
        residual,
        x if norm is None else norm,
        x if scaled is None else scaled.values,
        x if scaled is None else scaled.squares,
        num_tokens,
        N=n,
        BIAS=bias is not None,
        SCALED=scaled is not None,
        PARTS=1 if scaled is None else scaled.squares.shape[1],
        BLOCK_M=block_m(num_tokens),
        **constants(config, x, k, pdl),
    )


def norm_linear(
    x: Scaled,
    eps: float,
    weight: Tensor,
    bias: Tensor | None = None,
    *,
    rows: Tensor | None = None,
    out: Tensor | None = None,
    config: TileConfig | None = None,
    pdl: bool = False,
    settled: bool = False,
) -> Tensor:
    """rms_norm(x[rows]) Wᵀ + bias -> [M, N]: the head, and projections without a fused epilogue.

    x [T, K] as skinny_scaled.py has it; W [N, K]; `rows` [M] int64, M <= 64 (None: all of x). One dtype, contiguous.
    `settled`: with `pdl`, `rows` was complete before the kernel before began. Raises ValueError if M is too large.
    """
    values = x.values
    num_tokens, (n, k) = len(values) if rows is None else len(rows), weight.shape
    check_tokens(num_tokens)
    if out is None:
        out = torch.empty(num_tokens, n, dtype=values.dtype, device=values.device)
    config = config or configs_for(Kind.HEAD, num_tokens, n, k, values.element_size())[0]
    _linear_kernel[(ceil_div(n, config.block_n),)](
        values,
        x.squares,
        values if rows is None else rows,
        eps,
        weight,
        values if bias is None else bias,
        out,
        num_tokens,
        N=n,
        GATHER=rows is not None,
        BIAS=bias is not None,
        SETTLED=settled,
        PARTS=x.squares.shape[1],
        BLOCK_M=block_m(num_tokens),
        **constants(config, values, k, pdl),
    )
    return out


def linear_residual_reference(residual: Tensor, x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """What linear_residual_ leaves in `residual`, as a new tensor."""
    product = F.linear(x.float(), weight.float(), None if bias is None else bias.float())
    return (residual.float() + product).to(residual.dtype)


def norm_linear_reference(
    x: Tensor, norm: Tensor, eps: float, weight: Tensor, bias: Tensor | None = None, rows: Tensor | None = None
) -> Tensor:
    """What norm_linear returns for x [T, K] and norm [K], computed in float32."""
    wide = x.float() if rows is None else x[rows].float()
    wide = F.rms_norm(wide, (wide.shape[1],), norm.float(), eps)
    return F.linear(wide, weight.float(), None if bias is None else bias.float()).to(x.dtype)
