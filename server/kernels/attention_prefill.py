"""Attention of prompt chunks: ragged rows of query tokens over the paged pool, or whole prompts over contiguous keys.

Here arithmetic decides. Tiles of BLOCK_M packed queries (FlashAttention-2, arXiv 2307.08691) walk the tokens they see:
without masks where every query sees every token, with masks at the diagonal and at a window's edge. In deterministic
mode the decode kernel itself does the work, with the same tiles and the same runs in the same order, so that a token
has the bits that decoding would have given it.
"""

from __future__ import annotations

import inspect
from functools import lru_cache
from itertools import pairwise
from typing import Any

import torch
import torch.nn.functional as F
import triton
import triton.language as tl
from torch import Tensor

from server.kernels.attention import Scores, check_operands, launch, scales
from server.kernels.attention_plan import DETERMINISTIC_TOKENS, Splits, Tile, decode_tile, queries_a_tile
from server.kernels.attention_tiles import attend, read_queries, write, zero_tail
from server.kernels.paged import PagedRows
from server.kernels.runtime import ceil_div, dot_precision, next_power_of_2

_FOUR_RESIDENT = 128
"""Registers a thread that let four programs of four warps share a multiprocessor."""


@triton.jit(do_not_specialize=["table_stride", "num_tokens"])
def prefill_kernel(
    q, pool, slots, starts, offsets, tables, sinks, out,
    scale, softcap, v_scale, q_stride, table_stride, num_tokens,
    W: tl.constexpr, G: tl.constexpr, KVH: tl.constexpr, QT: tl.constexpr,
    D: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_SIZE: tl.constexpr,
    WINDOW: tl.constexpr, CAPPED: tl.constexpr, SINKS: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Grid (query tiles, key heads, rows): a row's last query tile, which sees most, comes first."""
    row = tl.program_id(2)
    kv_head = tl.program_id(1)
    if W > 0:
        token = row * W
        width = W
    else:
        token = tl.load(offsets + row)
        width = tl.load(offsets + row + 1) - token
    if row == tl.num_programs(2) - 1:
        shares = tl.num_programs(0)
        zero_tail(out, token + width, num_tokens, tl.program_id(0), shares, kv_head, G, KVH, D, BLOCK_D, 16)
    query = (tl.cdiv(width, QT) - 1 - tl.program_id(0)) * QT
    if query < 0:
        return
    start = tl.load(starts + row).to(tl.int32) + query
    table = tables + tl.load(slots + row) * table_stride
    length = start + tl.minimum(width - query, QT)
    i = tl.arange(0, BLOCK_M)
    j = query + i // G
    head = kv_head * G + i % G
    valid = (i < QT * G) & (j < width)
    queries = read_queries(q, token + j, head, valid, q_stride, D, BLOCK_D)
    keys = pool + kv_head * D
    at = start + i // G
    m = tl.full([BLOCK_M], float("-inf"), tl.float32)
    z = tl.zeros([BLOCK_M], tl.float32)
    acc = tl.zeros([BLOCK_M, BLOCK_D], tl.float32)
    end = tl.cdiv(length, BLOCK_N)
    full = 0
    if WINDOW > 0:
        low = tl.maximum(start - WINDOW + 1, 0) // BLOCK_N
        full = tl.minimum(tl.cdiv(tl.maximum(length - WINDOW, 0), BLOCK_N), end)
        m, z, acc = attend(
            queries, at, m, z, acc, table, keys, low, full, length, scale, softcap,
            2 * KVH * D, D, BLOCK_D, BLOCK_N, BLOCK_SIZE, WINDOW, CAPPED, True, PRECISION,
        )  # fmt: skip
    diagonal = tl.maximum((start + 1) // BLOCK_N, full)
    m, z, acc = attend(
        queries, at, m, z, acc, table, keys, full, diagonal, length, scale, softcap,
        2 * KVH * D, D, BLOCK_D, BLOCK_N, BLOCK_SIZE, WINDOW, CAPPED, False, PRECISION,
    )  # fmt: skip
    m, z, acc = attend(
        queries, at, m, z, acc, table, keys, diagonal, end, length, scale, softcap,
        2 * KVH * D, D, BLOCK_D, BLOCK_N, BLOCK_SIZE, WINDOW, CAPPED, True, PRECISION,
    )  # fmt: skip
    write(m, z, acc, out, sinks, token + j, head, valid, v_scale, KVH * G, D, BLOCK_D, SINKS)


def prefill_tile(head_dim: int, dtype: torch.dtype) -> Tile:
    """The tile of prompt chunks: one warp group of 64 packed queries, so that several programs share a multiprocessor
    and one's products hide another's softmax."""
    if dtype == torch.float32:
        return Tile(16, 16, 4, 2)
    if head_dim > 128:
        return Tile(128, 64, 8, 2)
    return Tile(64, 64, 4, 2, _FOUR_RESIDENT if head_dim <= 64 else 0)


def prefill_attention(
    q: Tensor,
    pool: Tensor,
    rows: PagedRows,
    *,
    scale: float,
    window: int | None = None,
    softcap: float | None = None,
    sinks: Tensor | None = None,
    k_scale: float = 1.0,
    v_scale: float = 1.0,
    out: Tensor | None = None,
    deterministic: bool = False,
    tile: Tile | None = None,
) -> Tensor:
    """Causal attention of q [N, heads, head_dim], ragged `rows`, over the paged pool -> [N, heads * head_dim], as q.

    As `decode_attention`, for rows of any length; tokens behind the last row's give zeros.
    `deterministic`: the bits that `decode_attention` gives with deterministic splits.

    Raises ValueError for operands that do not fit each other or the kernel.
    """
    heads, kv_heads, dim = check_operands(q, pool, rows, out)
    if rows.width == 0 and rows.offsets is None:
        raise ValueError("rows without a common width need offsets")
    if out is None:
        out = torch.empty(q.shape[0], heads * dim, dtype=q.dtype, device=q.device)
    group = heads // kv_heads
    if deterministic:
        tile = tile or decode_tile(0, group, dim, q.dtype, pool.dtype, exact=True)
        how = Scores(scale, window, softcap, sinks, k_scale, v_scale)
        launch(q, pool, rows, how, Splits(1, DETERMINISTIC_TOKENS), None, out, tile)
        return out
    tile = tile or prefill_tile(dim, q.dtype)
    per_tile = queries_a_tile(rows.width, group, tile.block_m)
    bounded = {"maxnreg": tile.max_registers} if tile.max_registers else {}
    factor, cap = scales(scale, softcap, k_scale)
    prefill_kernel[(ceil_div(rows.width or rows.max_width, per_tile), kv_heads, rows.num_rows)](
        q, pool, rows.slots, rows.starts, rows.slots if rows.offsets is None else rows.offsets, rows.block_tables,
        out if sinks is None else sinks, out, factor, cap, v_scale, q.stride(0), rows.block_tables.stride(0),
        q.shape[0], W=rows.width, G=group, KVH=kv_heads, QT=per_tile, D=dim, BLOCK_D=next_power_of_2(dim),
        BLOCK_M=tile.block_m, BLOCK_N=tile.block_n, BLOCK_SIZE=rows.block_size, WINDOW=window or 0,
        CAPPED=softcap is not None, SINKS=sinks is not None, PRECISION=dot_precision(q.dtype),
        num_warps=tile.num_warps, num_stages=tile.num_stages, **bounded,
    )  # fmt: skip
    return out


@triton.jit(do_not_specialize=["num_rows", "num_tokens"])
def tail_kernel(out, offsets, num_rows, num_tokens, H: tl.constexpr, D: tl.constexpr, BLOCK_D: tl.constexpr):
    """Grid (heads, parts): zeros for the tokens behind the last row."""
    token = tl.load(offsets + num_rows)
    zero_tail(out, token, num_tokens, tl.program_id(1), tl.num_programs(1), tl.program_id(0), 1, H, D, BLOCK_D, 16)


@lru_cache(maxsize=1)
def _grouped_heads_option() -> dict[str, Any]:
    """Newer torch wants grouped heads asked for by name; older torch takes them as they come."""
    from torch.nn.attention.varlen import varlen_attn

    return {"enable_gqa": True} if "enable_gqa" in inspect.signature(varlen_attn).parameters else {}


def fresh_attention(
    q: Tensor, k: Tensor, v: Tensor, rows: PagedRows, *, scale: float, window: int | None = None
) -> Tensor:
    """Causal attention of whole prompts, q [N, heads, D], k and v [N, kv_heads, D] -> [N, heads * D]; no pool is read.

    `rows.fresh` must hold: `offsets` cut the queries and the keys alike, so that both causal conventions agree. Views
    of a fused buffer are taken as they are. On a GPU in 16 bits FlashAttention (`torch.nn.attention.varlen`); else row
    by row, which reads `offsets` on the host. Tokens behind the last row's give zeros. No softcap and no sinks:
    `prefill_attention` has them. Raises ValueError for rows that are not fresh or have no offsets.
    """
    if not rows.fresh or rows.offsets is None:
        raise ValueError("fresh_attention takes whole prompts with offsets; use prefill_attention")
    num_tokens, heads, dim = q.shape
    if not q.is_cuda or q.dtype == torch.float32:
        return _row_by_row(q, k, v, rows.offsets.tolist(), scale, window)
    from torch.nn.attention.varlen import varlen_attn

    left = -1 if window is None else window - 1
    res = varlen_attn(
        q, k, v, rows.offsets, rows.offsets, rows.max_width, rows.max_width,
        scale=scale, window_size=(left, 0), **_grouped_heads_option(),
    )  # fmt: skip
    assert isinstance(res, Tensor)
    tail_kernel[(heads, 4)](res, rows.offsets, rows.num_rows, num_tokens, H=heads, D=dim, BLOCK_D=next_power_of_2(dim))
    return res.view(num_tokens, heads * dim)


def _row_by_row(q: Tensor, k: Tensor, v: Tensor, offsets: list[int], scale: float, window: int | None) -> Tensor:
    out = q.new_zeros(q.shape)
    for first, behind in pairwise(offsets):
        at = torch.arange(behind - first, device=q.device)
        seen = at[None, :] <= at[:, None]
        if window is not None:
            seen = seen & (at[None, :] > at[:, None] - window)
        query, key, value = (x[first:behind].transpose(0, 1).unsqueeze(0) for x in (q, k, v))
        res = F.scaled_dot_product_attention(query, key, value, attn_mask=seen, scale=scale, enable_gqa=True)
        out[first:behind] = res[0].transpose(0, 1)
    return out.view(len(q), -1)
