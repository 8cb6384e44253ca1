"""Linear layers for a few tokens (M <= 64) with what surrounds them fused: norm, bias, residual, gathered rows.

The layer's others are in skinny_qkv.py (with rotary embedding and the write to the pool) and skinny_mlp.py (gate and
up). How the product is computed: skinny_product.py. What tiles there are: skinny_tiles.py.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
import triton
import triton.language as tl
from torch import Tensor

from server.kernels.runtime import ceil_div
from server.kernels.skinny_product import ahead, product
from server.kernels.skinny_tiles import Kind, TileConfig, block_m, check_tokens, configs_for, constants


@triton.jit(do_not_specialize=["M"])
def _linear_kernel(
    x_ptr: tl.tensor,
    rows_ptr: tl.tensor,
    norm_ptr: tl.tensor,
    eps: tl.tensor,
    w_ptr: tl.tensor,
    bias_ptr: tl.tensor,
    out_ptr: tl.tensor,
    M: tl.tensor,
    N: tl.constexpr,
    K: tl.constexpr,
    GATHER: tl.constexpr,
    NORM: tl.constexpr,
    BIAS: tl.constexpr,
    RESIDUAL: tl.constexpr,
    SETTLED: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    SPLIT: tl.constexpr,
    PRESCALE: tl.constexpr,
    PRECISION: tl.constexpr,
    PREFETCH: tl.constexpr,
    THREADS: tl.constexpr,
    PDL: tl.constexpr,
) -> None:
    first = tl.program_id(0) * BLOCK_N
    n = first + tl.arange(0, BLOCK_N)
    w, pair, norm = ahead(
        w_ptr, norm_ptr, first, N, K, BLOCK_N, BLOCK_K, SPLIT, False, NORM, PRESCALE, PREFETCH, THREADS, PDL
    )
    m = tl.arange(0, BLOCK_M)
    present = m < M
    row = m.to(tl.int64)
    if PDL and not SETTLED:
        tl.extra.cuda.gdc_wait()
    if GATHER:
        row = tl.load(rows_ptr + m, mask=present, other=0)
    if PDL and SETTLED:
        tl.extra.cuda.gdc_wait()
    at = out_ptr + m.to(tl.int64)[:, None] * N + n[None, :]
    stored = present[:, None] & (n < N)[None, :]
    before = 0.0
    if RESIDUAL:
        before = tl.load(at, mask=stored, other=0.0).to(tl.float32)
    acc, _ = product(
        x_ptr, row, present, w, pair, norm, eps,
        K, BLOCK_M, BLOCK_N, BLOCK_K, SPLIT, False, NORM, PRESCALE, PRECISION,
    )  # fmt: skip
    if BIAS:
        acc += tl.load(bias_ptr + n, mask=n < N, other=0.0).to(tl.float32)[None, :]
    if RESIDUAL:
        acc += before
    tl.store(at, acc.to(out_ptr.dtype.element_ty), mask=stored)


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
    _launch(x, None, None, 0.0, weight, bias, residual, Kind.RESIDUAL, config, pdl)
    return residual


def norm_linear(
    x: Tensor,
    norm: Tensor | None,
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

    x [T, K]; `norm` [K] (None: x as it is); W [N, K]; `rows` [M] int64, M <= 64 (None: all of x). One dtype,
    contiguous. `settled`: with `pdl`, `rows` was complete before the kernel before began. Raises ValueError if M is too
    large.
    """
    num_tokens = x.shape[0] if rows is None else rows.shape[0]
    if out is None:
        out = torch.empty(num_tokens, weight.shape[0], dtype=x.dtype, device=x.device)
    _launch(x, rows, norm, eps, weight, bias, out, Kind.HEAD, config, pdl, settled)
    return out


def _launch(
    x: Tensor,
    rows: Tensor | None,
    norm: Tensor | None,
    eps: float,
    weight: Tensor,
    bias: Tensor | None,
    out: Tensor,
    kind: Kind,
    config: TileConfig | None,
    pdl: bool,
    settled: bool = False,
) -> None:
    num_tokens, (n, k) = out.shape[0], weight.shape
    check_tokens(num_tokens)
    config = config or configs_for(kind, num_tokens, n, k, x.element_size())[0]
    _linear_kernel[(ceil_div(n, config.block_n),)](
        x,
        x if rows is None else rows,
        x if norm is None else norm,
        eps,
        weight,
        x if bias is None else bias,
        out,
        num_tokens,
        N=n,
        GATHER=rows is not None,
        NORM=norm is not None,
        BIAS=bias is not None,
        RESIDUAL=kind is Kind.RESIDUAL,
        SETTLED=settled,
        BLOCK_M=block_m(num_tokens),
        **constants(config, x, k, pdl),
    )


def linear_residual_reference(residual: Tensor, x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """What linear_residual_ leaves in `residual`, as a new tensor."""
    product = F.linear(x.float(), weight.float(), None if bias is None else bias.float())
    return (residual.float() + product).to(residual.dtype)


def norm_linear_reference(
    x: Tensor, norm: Tensor | None, eps: float, weight: Tensor, bias: Tensor | None = None, rows: Tensor | None = None
) -> Tensor:
    """What norm_linear returns, computed in float32."""
    wide = x.float() if rows is None else x[rows].float()
    if norm is not None:
        wide = F.rms_norm(wide, (wide.shape[1],), norm.float(), eps)
    return F.linear(wide, weight.float(), None if bias is None else bias.float()).to(x.dtype)
