"""A decoder layer's qkv projection in low precision for a few tokens, with rotary embedding and the write to the pool.

The norm and its quantisation come before (quantize.py); the rest is as in skinny_qkv.py.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from server.kernels.eightbit_linear import prepared, scaled_product
from server.kernels.eightbit_tiles import EightTile, Weight, candidates, constants
from server.kernels.quantize import Quantized
from server.kernels.runtime import ceil_div
from server.kernels.skinny_qkv import Heads, _clamp, _rotated, _turn
from server.kernels.skinny_tiles import Kind


@triton.jit(do_not_specialize=["M"])
def _qkv_kernel(
    x_ptr: tl.tensor,
    row_scales_ptr: tl.tensor,
    w_ptr: tl.tensor,
    column_scales_ptr: tl.tensor,
    bias_ptr: tl.tensor,
    positions_ptr: tl.tensor,
    rotations_ptr: tl.tensor,
    slots_ptr: tl.tensor,
    q_ptr: tl.tensor,
    pool_ptr: tl.tensor,
    M: tl.tensor,
    N: tl.constexpr,
    QUERIES: tl.constexpr,
    ROTATED: tl.constexpr,
    POSITIONS: tl.constexpr,
    D: tl.constexpr,
    CLAMP: tl.constexpr,
    BIAS: tl.constexpr,
    ROTATE: tl.constexpr,
    SETTLED: tl.constexpr,
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
    """Columns below QUERIES go to q [M, QUERIES], the others to the pool; those below ROTATED are q and k."""
    first = tl.program_id(0) * BLOCK_N
    n = first + tl.arange(0, BLOCK_N)
    w, tail = prepared(
        w_ptr, first, 0,
        N, K, STRIDE, GROUP, BLOCK_N, BLOCK_K, TAIL, SPLIT, False, PREFETCH, THREADS, PDL,
    )  # fmt: skip
    m = tl.arange(0, BLOCK_M)
    present = m < M
    if PDL and not SETTLED:
        tl.extra.cuda.gdc_wait()
    slot = tl.load(slots_ptr + m, mask=present, other=0)
    bias, cos, sin = 0.0, 0.0, 0.0
    if BIAS:
        bias = tl.load(bias_ptr + n, mask=n < N, other=0.0).to(tl.float32)[None, :]
    if ROTATE:
        cos, sin = _turn(positions_ptr, rotations_ptr, first, present, POSITIONS, D, ROTATED, BLOCK_M, BLOCK_N)
    if PDL and SETTLED:
        tl.extra.cuda.gdc_wait()
    acc = scaled_product(
        x_ptr, row_scales_ptr, w_ptr, column_scales_ptr, w, tail, present, first, 0,
        N, K, STRIDE, GROUP, MINIMUM, BLOCK_M, BLOCK_N, BLOCK_K, TAIL, SHARE, SPLIT, False, SWAP, ROW_SCALES, PRECISION,
        PACKED,
    )  # fmt: skip
    acc += bias
    if ROTATE:
        acc = _rotated(acc, cos, sin, BLOCK_M, BLOCK_N)
    q_at = q_ptr + m[:, None] * QUERIES + n[None, :]
    tl.store(q_at, acc.to(q_ptr.dtype.element_ty), mask=present[:, None] & (n < QUERIES)[None, :])
    if CLAMP > 0:  # a float8 has no infinity to say that a number was too large
        acc = tl.minimum(tl.maximum(acc, -CLAMP), CLAMP)
    kv_at = pool_ptr + slot[:, None] * (N - QUERIES) + (n - QUERIES)[None, :]
    tl.store(kv_at, acc.to(pool_ptr.dtype.element_ty), mask=present[:, None] & ((n >= QUERIES) & (n < N))[None, :])


def qkv_rope8(
    x: Quantized,
    weight: Weight,
    bias: Tensor | None,
    pool: Tensor,
    positions: Tensor,
    slot_mapping: Tensor,
    rotations: Tensor,
    heads: Heads,
    dtype: torch.dtype,
    *,
    rotate: bool = True,
    tile: EightTile | None = None,
    pdl: bool = False,
    settled: bool = False,
) -> Tensor:
    """Queries [M, num_heads * head_dim] of `dtype` of x Wᵀ + bias, rotated; keys (rotated) and values go to `pool`.

    x [M, K] normed and quantised, M <= 64. The others as in skinny_qkv.norm_qkv_rope. Raises ValueError if M is too
    large.
    """
    num_tokens, columns = len(x.values), heads.columns
    queries = heads.num_heads * heads.head_dim
    out = torch.empty(num_tokens, queries, dtype=dtype, device=x.values.device)
    size = x.values.element_size()
    tile = tile or candidates(Kind.QKV, num_tokens, columns, weight.columns, size, weight.group, weight.per)[0]
    _qkv_kernel[(ceil_div(columns, tile.block_n),)](
        x.values,
        x.values if x.scales is None else x.scales,
        weight.values,
        weight.scales,
        x.values if bias is None else bias,
        positions,
        rotations,
        slot_mapping,
        out,
        pool,
        num_tokens,
        N=columns,
        QUERIES=queries,
        ROTATED=queries + heads.num_kv_heads * heads.head_dim,
        POSITIONS=rotations.shape[0],
        D=heads.head_dim,
        CLAMP=_clamp(pool.dtype),
        BIAS=bias is not None,
        ROTATE=rotate,
        SETTLED=settled,
        **constants(tile, x.values, weight, num_tokens, pdl),
    )
    return out
