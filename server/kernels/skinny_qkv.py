"""The first kernel of a decoder layer for a few tokens: norm, qkv projection, rotary embedding, write to the KV pool.

Rotary pairs lie side by side (server/models/rope.py), so a program's columns hold whole pairs.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
import triton
import triton.language as tl
from torch import Tensor

from server.kernels.runtime import ceil_div
from server.kernels.skinny_product import ahead, product
from server.kernels.skinny_scaled import Scaled, inverse_rms, load_squares
from server.kernels.skinny_tiles import Kind, TileConfig, block_m, check_tokens, configs_for, constants


def _clamp(dtype: torch.dtype) -> float:
    """The largest number of a float8, 0 for other types."""
    return torch.finfo(dtype).max if dtype.itemsize == 1 else 0.0


@dataclass(frozen=True, slots=True)
class Heads:
    """Shape of a layer's attention: columns of qkv are q heads, then k heads, then v heads."""

    num_heads: int
    num_kv_heads: int
    head_dim: int

    @property
    def columns(self) -> int:
        return (self.num_heads + 2 * self.num_kv_heads) * self.head_dim


@triton.jit
def _turn(
    positions_ptr: tl.tensor,
    rotations_ptr: tl.tensor,
    first: tl.tensor,
    present: tl.tensor,
    POSITIONS: tl.constexpr,
    D: tl.constexpr,
    ROTATED: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
) -> tl.tensor:
    """(cos, sin) [BLOCK_M, BLOCK_N / 2] of the columns' pairs at the tokens' positions; 1 and 0 where v is."""
    m = tl.arange(0, BLOCK_M)
    position = tl.minimum(tl.load(positions_ptr + m, mask=present, other=0), POSITIONS - 1)
    column = first + 2 * tl.arange(0, BLOCK_N // 2)
    turned = present[:, None] & (column < ROTATED)[None, :]
    at = rotations_ptr + position[:, None] * D + (column % D)[None, :]
    return tl.load(at, mask=turned, other=1.0), tl.load(at + 1, mask=turned, other=0.0)


@triton.jit
def _rotated(acc: tl.tensor, cos: tl.tensor, sin: tl.tensor, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr) -> tl.tensor:
    """Column pairs (2i, 2i + 1) of acc turned by (cos, sin)."""
    even, odd = tl.split(tl.reshape(acc, [BLOCK_M, BLOCK_N // 2, 2]))
    return tl.reshape(tl.join(even * cos - odd * sin, even * sin + odd * cos), [BLOCK_M, BLOCK_N])


@triton.jit(do_not_specialize=["M"])
def _norm_qkv_rope_kernel(
    x_ptr: tl.tensor,
    squares_ptr: tl.tensor,
    eps: tl.tensor,
    w_ptr: tl.tensor,
    bias_ptr: tl.tensor,
    positions_ptr: tl.tensor,
    rotations_ptr: tl.tensor,
    slots_ptr: tl.tensor,
    q_ptr: tl.tensor,
    pool_ptr: tl.tensor,
    M: tl.tensor,
    N: tl.constexpr,
    K: tl.constexpr,
    QUERIES: tl.constexpr,
    ROTATED: tl.constexpr,
    POSITIONS: tl.constexpr,
    D: tl.constexpr,
    CLAMP: tl.constexpr,
    BIAS: tl.constexpr,
    ROTATE: tl.constexpr,
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
    """Columns below QUERIES go to q [M, QUERIES], the others to the pool; those below ROTATED are q and k."""
    first = tl.program_id(0) * BLOCK_N
    n = first + tl.arange(0, BLOCK_N)
    w, tail = ahead(w_ptr, first, N, K, BLOCK_N, BLOCK_K, TAIL, SPLIT, False, PREFETCH, THREADS, PDL)
    m = tl.arange(0, BLOCK_M)
    present = m < M
    if PDL and not SETTLED:
        tl.extra.cuda.gdc_wait()
    slot = tl.load(slots_ptr + m, mask=present, other=0)
    bias, cos, sin = 0.0, 0.0, 0.0
    EARLY: tl.constexpr = SETTLED or BLOCK_K + TAIL >= K
    if BIAS:
        bias = tl.load(bias_ptr + n, mask=n < N, other=0.0).to(tl.float32)[None, :]
    if ROTATE and EARLY:  # two loads, one after the other, are long for a small layer: before the product or beside x
        cos, sin = _turn(positions_ptr, rotations_ptr, first, present, POSITIONS, D, ROTATED, BLOCK_M, BLOCK_N)
    if PDL and SETTLED:
        tl.extra.cuda.gdc_wait()
    squares = load_squares(squares_ptr, m.to(tl.int64), present, PARTS, BLOCK_M)
    acc = product(
        x_ptr, m.to(tl.int64), present, w, tail, first,
        N, K, BLOCK_M, BLOCK_N, BLOCK_K, TAIL, SPLIT, False, PRECISION,
    )  # fmt: skip
    acc = acc * inverse_rms(squares, eps, K, PRESCALE) + bias
    if ROTATE:
        if not EARLY:
            cos, sin = _turn(positions_ptr, rotations_ptr, first, present, POSITIONS, D, ROTATED, BLOCK_M, BLOCK_N)
        acc = _rotated(acc, cos, sin, BLOCK_M, BLOCK_N)
    q_at = q_ptr + m[:, None] * QUERIES + n[None, :]
    tl.store(q_at, acc.to(q_ptr.dtype.element_ty), mask=present[:, None] & (n < QUERIES)[None, :])
    if CLAMP > 0:  # a float8 has no infinity to say that a number was too large
        acc = tl.minimum(tl.maximum(acc, -CLAMP), CLAMP)
    kv_at = pool_ptr + slot[:, None] * (N - QUERIES) + (n - QUERIES)[None, :]
    tl.store(kv_at, acc.to(pool_ptr.dtype.element_ty), mask=present[:, None] & ((n >= QUERIES) & (n < N))[None, :])


def norm_qkv_rope(
    x: Scaled,
    eps: float,
    weight: Tensor,
    bias: Tensor | None,
    pool: Tensor,
    positions: Tensor,
    slot_mapping: Tensor,
    rotations: Tensor,
    heads: Heads,
    *,
    rotate: bool = True,
    out: Tensor | None = None,
    config: TileConfig | None = None,
    pdl: bool = False,
    settled: bool = False,
) -> Tensor:
    """Queries [M, num_heads * head_dim] of rms_norm(x) Wᵀ + bias, rotated; keys (rotated) and values go to `pool`.

    x [M, K] as skinny_scaled.py has it, M <= 64; W [heads.columns, K]; `pool` [places, 2 * num_kv_heads, head_dim], of
    x's dtype or float8_e4m3fn; `positions` and `slot_mapping` [M] int64; `rotations` [P, head_dim / 2, 2] float32, cos
    and sin. All contiguous. Positions past the end of `rotations` (drafts that nobody will keep) take its last row.
    `settled`: with `pdl`, positions and slots were complete before the kernel before began, and are read early. Raises
    ValueError if M is too large.
    """
    values = x.values
    num_tokens, k = values.shape
    check_tokens(num_tokens)
    queries, columns = heads.num_heads * heads.head_dim, heads.columns
    if out is None:
        out = torch.empty(num_tokens, queries, dtype=values.dtype, device=values.device)
    config = config or configs_for(Kind.QKV, num_tokens, columns, k, values.element_size())[0]
    _norm_qkv_rope_kernel[(ceil_div(columns, config.block_n),)](
        values,
        x.squares,
        eps,
        weight,
        values if bias is None else bias,
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
        PARTS=x.squares.shape[1],
        BLOCK_M=block_m(num_tokens),
        **constants(config, values, k, pdl),
    )
    return out


def norm_qkv_rope_reference(
    x: Tensor,
    norm: Tensor,
    eps: float,
    weight: Tensor,
    bias: Tensor | None,
    pool: Tensor,
    positions: Tensor,
    slot_mapping: Tensor,
    rotations: Tensor,
    heads: Heads,
    *,
    rotate: bool = True,
) -> Tensor:
    """The same in torch for x [M, K] and norm [K], computed in float32; writes `pool` too."""
    normed = F.rms_norm(x.float(), (x.shape[1],), norm.float(), eps)
    qkv = F.linear(normed, weight.float(), None if bias is None else bias.float())
    qkv = qkv.view(len(x), heads.num_heads + 2 * heads.num_kv_heads, heads.head_dim)
    if rotate:
        turned = qkv[:, : heads.num_heads + heads.num_kv_heads].unflatten(-1, (-1, 2))
        even, odd = turned.unbind(-1)
        cos, sin = rotations[positions.clamp(max=len(rotations) - 1)].unsqueeze(1).unbind(-1)
        turned.copy_(torch.stack((even * cos - odd * sin, even * sin + odd * cos), dim=-1))
    kv, limit = qkv[:, heads.num_heads :], _clamp(pool.dtype)
    pool[slot_mapping] = (kv.clamp(-limit, limit) if limit else kv).to(pool.dtype)
    return qkv[:, : heads.num_heads].flatten(1).to(x.dtype)
