"""Rotary embedding (Su et al. 2021, section 3.4) of new queries and keys and the write into the KV pool: one kernel.

Per-head RMSNorm of queries and keys (Qwen3) comes first where the model has it. Pairs lie side by side (2i, 2i+1) and
are rotated in float32.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from server.kernels.runtime import ceil_div, next_power_of_2, pdl_options

_TILE = 1024
"""Elements a program: heads times padded head size."""

_FP8_MAX = 448.0


@triton.jit
def _rotate(x: tl.tensor, rotation: tl.tensor, ROWS: tl.constexpr, HALF: tl.constexpr) -> tl.tensor:
    """Turns x [ROWS, 2 * HALF], pairs side by side, by rotation [2 * HALF] (cos and sin side by side)."""
    even, odd = tl.split(tl.reshape(x, (ROWS, HALF, 2)))
    cos, sin = tl.split(tl.reshape(rotation, (HALF, 2)))
    cos, sin = cos[None, :], sin[None, :]
    return tl.reshape(tl.join(even * cos - odd * sin, even * sin + odd * cos), (ROWS, 2 * HALF))


@triton.jit
def _rope_write_kernel(
    qkv_ptr: tl.tensor,
    pool_ptr: tl.tensor,
    positions_ptr: tl.tensor,
    slot_mapping_ptr: tl.tensor,
    rotations_ptr: tl.tensor,
    q_norm_ptr: tl.tensor,
    k_norm_ptr: tl.tensor,
    qkv_stride: tl.tensor,
    last_position: tl.tensor,
    eps: tl.tensor,
    HEADS: tl.constexpr,
    KV_HEADS: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    BLOCK_HEADS: tl.constexpr,
    HALF: tl.constexpr,
    NORM: tl.constexpr,
    ROTATE: tl.constexpr,
    FP8: tl.constexpr,
    PDL: tl.constexpr,
) -> None:
    token = tl.program_id(0).to(tl.int64)
    heads = tl.program_id(1) * BLOCK_HEADS + tl.arange(0, BLOCK_HEADS)
    dims = tl.arange(0, 2 * HALF)
    is_query = (heads < HEADS)[:, None]
    is_key = ((heads >= HEADS) & (heads < HEADS + KV_HEADS))[:, None]
    whole = dims < HEAD_DIM
    inside = (heads < HEADS + 2 * KV_HEADS)[:, None] & whole[None, :]
    element = qkv_ptr.dtype.element_ty
    if PDL:
        tl.extra.cuda.gdc_wait()
        tl.extra.cuda.gdc_launch_dependents()
    place = tl.load(slot_mapping_ptr + token).to(tl.int64)
    at = qkv_ptr + token * qkv_stride + heads[:, None] * HEAD_DIM + dims[None, :]
    x = tl.load(at, mask=inside, other=0.0).to(tl.float32)
    if NORM:
        q_weight = tl.load(q_norm_ptr + dims, mask=whole, other=0.0).to(tl.float32)
        k_weight = tl.load(k_norm_ptr + dims, mask=whole, other=0.0).to(tl.float32)
        weight = tl.where(is_query, q_weight[None, :], k_weight[None, :])
        scale = tl.rsqrt(tl.sum(x * x, axis=1) / HEAD_DIM + eps)
        normed = (x * scale[:, None] * weight).to(element).to(tl.float32)
        x = tl.where(is_query | is_key, normed, x)
    if ROTATE:
        position = tl.minimum(tl.load(positions_ptr + token).to(tl.int64), last_position)
        rotation = tl.load(rotations_ptr + position * HEAD_DIM + dims, mask=whole, other=0.0)
        x = tl.where(is_query | is_key, _rotate(x, rotation, BLOCK_HEADS, HALF), x)
    y = x.to(element)
    tl.store(at, y, mask=inside & is_query)
    pooled = y
    if FP8:
        pooled = tl.minimum(tl.maximum(y.to(tl.float32), -448.0), 448.0)
    pool_at = pool_ptr + place * (2 * KV_HEADS * HEAD_DIM) + (heads[:, None] - HEADS) * HEAD_DIM + dims[None, :]
    tl.store(pool_at, pooled.to(pool_ptr.dtype.element_ty), mask=inside & (heads >= HEADS)[:, None])


def rope_write(
    qkv: Tensor,
    pool: Tensor,
    positions: Tensor,
    slot_mapping: Tensor,
    rotations: Tensor,
    heads: int,
    kv_heads: int,
    head_dim: int,
    q_norm: Tensor | None = None,
    k_norm: Tensor | None = None,
    eps: float = 0.0,
    rotate: bool = True,
) -> None:
    """Turns the queries of qkv [N, (heads + 2 kv_heads) * head_dim] in place and writes keys and values to the pool.

    `pool` [P, 2 kv_heads, head_dim] (contiguous; qkv's dtype or float8_e4m3fn, to which values saturate) takes token
    n's keys and values at place `slot_mapping[n]`; `positions` and `slot_mapping` [N] int64. `rotations` [positions,
    head_dim / 2, 2] float32 is (cos, sin); positions past its end (drafts nobody will keep) take its last row.
    `q_norm` and `k_norm` [head_dim], both or neither, are RMSNorm weights applied before, rounded to qkv's dtype.
    """
    num_tokens = qkv.shape[0]
    if num_tokens == 0:
        return
    padded = next_power_of_2(head_dim)
    num_heads = heads + 2 * kv_heads
    block_heads = min(max(_TILE // padded, 1), next_power_of_2(num_heads))
    normed = q_norm is not None and k_norm is not None
    _rope_write_kernel[(num_tokens, ceil_div(num_heads, block_heads))](
        qkv,
        pool,
        positions,
        slot_mapping,
        rotations,
        q_norm if normed else rotations,
        k_norm if normed else rotations,
        qkv.stride(0),
        rotations.shape[0] - 1,
        eps,
        HEADS=heads,
        KV_HEADS=kv_heads,
        HEAD_DIM=head_dim,
        BLOCK_HEADS=block_heads,
        HALF=padded // 2,
        NORM=normed,
        ROTATE=rotate,
        FP8=pool.dtype == torch.float8_e4m3fn,
        num_warps=min(max(block_heads * padded // 256, 1), 4),
        **pdl_options(qkv.device),
    )


def rope_write_reference(
    qkv: Tensor,
    pool: Tensor,
    positions: Tensor,
    slot_mapping: Tensor,
    rotations: Tensor,
    heads: int,
    kv_heads: int,
    head_dim: int,
    q_norm: Tensor | None = None,
    k_norm: Tensor | None = None,
    eps: float = 0.0,
    rotate: bool = True,
) -> None:
    """`rope_write` in torch operations."""
    by_head = qkv.unflatten(-1, (heads + 2 * kv_heads, head_dim))
    q, k, v = by_head.float().split([heads, kv_heads, kv_heads], dim=1)
    if q_norm is not None and k_norm is not None:
        q, k = (
            (x * (x.square().mean(-1, keepdim=True) + eps).rsqrt() * w.float()).to(qkv.dtype).float()
            for x, w in ((q, q_norm), (k, k_norm))
        )
    if rotate:
        turn = torch.view_as_complex(rotations[positions.clamp(max=rotations.shape[0] - 1)]).unsqueeze(1)
        q, k = (
            torch.view_as_real(torch.view_as_complex(x.unflatten(-1, (-1, 2)).contiguous()) * turn).flatten(-2)
            for x in (q, k)
        )
    by_head[:, :heads] = q.to(qkv.dtype)
    pooled = torch.cat([k, v], dim=1).to(qkv.dtype)
    if pool.dtype == torch.float8_e4m3fn:
        pooled = pooled.float().clamp(-_FP8_MAX, _FP8_MAX)
    pool[slot_mapping] = pooled.to(pool.dtype)
