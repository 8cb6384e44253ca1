"""Attention of prompt chunks: ragged rows of query tokens over the paged pool.

Here arithmetic decides. Tiles of BLOCK_M packed queries (FlashAttention-2, arXiv 2307.08691) walk the tokens they see:
without masks where every query sees every token, with masks at the diagonal and at a window's edge. In deterministic
mode the decode kernel itself does the work, with the same tiles and the same runs in the same order, so that a token
has the bits that decoding would have given it.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from server.kernels.attention import Scores, check_operands, launch, scales
from server.kernels.attention_plan import DETERMINISTIC_TOKENS, Splits, Tile, decode_tile, queries_a_tile
from server.kernels.attention_tiles import attend, read_queries, write, zero_tail
from server.kernels.paged import PagedRows
from server.kernels.runtime import ceil_div, dot_precision, next_power_of_2, num_sms

_FOUR_RESIDENT = 128
"""Registers a thread that let four programs of four warps share a multiprocessor."""
_MANY_PROGRAMS = 8
"""A multiprocessor, of 128 queries each: two at a time, and a short last wave."""


@triton.jit
def row_of_tile(offsets, num_rows, tile, QT: tl.constexpr, BLOCK: tl.constexpr):
    """(row, its tile) of query tile `tile` of ragged rows; for a tile that is nobody's, one that the row has not.

    Row r's tiles begin at offsets[r] // QT + r. That leaves each row room for all of its tiles: n tokens from a on are
    at most (a + n) // QT - a // QT + 1. So a tile's row is the number of rows that begin no later, less one, whatever
    the lengths are.
    """
    begun = 0
    for first in tl.range(0, num_rows, BLOCK):
        r = first + tl.arange(0, BLOCK)
        begins = tl.load(offsets + r, mask=r < num_rows, other=0) // QT + r
        begun += tl.sum(((begins <= tile) & (r < num_rows)).to(tl.int32), 0)
    row = begun - 1
    return row, tile - (tl.load(offsets + row) // QT + row)


@triton.jit(do_not_specialize=["table_stride", "num_rows", "num_tokens"])
def prefill_kernel(
    q, pool, slots, starts, offsets, tables, sinks, out,
    scale, softcap, v_scale, q_stride, table_stride, num_rows, num_tokens,
    W: tl.constexpr, G: tl.constexpr, KVH: tl.constexpr, QT: tl.constexpr,
    D: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_SIZE: tl.constexpr,
    WINDOW: tl.constexpr, CAPPED: tl.constexpr, SINKS: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Grid (query tiles of all rows, key heads): a row's last query tile, which sees most, comes first.

    There may be more programs than tiles: those that have none only help with the padding's zeros.
    """
    tile = tl.program_id(0)
    kv_head = tl.program_id(1)
    if W > 0:
        row = tile // ((W + QT - 1) // QT)
        tile = tile % ((W + QT - 1) // QT)
        token = row * W
        width = W
        behind = num_rows * W
    else:
        row, tile = row_of_tile(offsets, num_rows, tile, QT, 128)
        token = tl.load(offsets + row)
        width = tl.load(offsets + row + 1) - token
        behind = tl.load(offsets + num_rows)
    zero_tail(out, behind, num_tokens, tl.program_id(0), tl.num_programs(0), kv_head, G, KVH, D, BLOCK_D, 16)
    query = (tl.cdiv(width, QT) - 1 - tile) * QT
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


def prefill_tile(head_dim: int, dtype: torch.dtype, packed: int, sms: int) -> Tile:
    """The tile of prompt chunks of `packed` queries times heads: one warp group, so that several programs share a
    multiprocessor and one's products hide another's softmax. 128 queries a tile halve what is read of keys and values,
    which is what bounds wide heads, where they still make several programs a multiprocessor.
    """
    if dtype == torch.float32:
        return Tile(16, 16, 4, 2)
    if head_dim > 128:
        return Tile(128, 64, 8, 2)
    if head_dim <= 64:
        return Tile(64, 64, 4, 2, _FOUR_RESIDENT)
    return Tile(128, 32, 4, 3) if packed >= _MANY_PROGRAMS * sms * 128 else Tile(64, 64, 4, 3)


def _num_tiles(rows: PagedRows, num_tokens: int, per_tile: int) -> int:
    """Query tiles of `per_tile` tokens that the rows can have at most: of ragged rows the host knows no lengths."""
    if rows.width:
        return rows.num_rows * ceil_div(rows.width, per_tile)
    return num_tokens // per_tile + rows.num_rows


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

    As `decode_attention`, for rows of any length, none included; tokens behind the last row's give zeros. How many
    programs run follows from N and R alone, so that a CUDA graph of it serves rows of other lengths.
    `deterministic`: the bits that `decode_attention` gives with deterministic splits. Its programs follow from
    `rows.max_width`: not for a graph whose rows change.

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
    tile = tile or prefill_tile(dim, q.dtype, q.shape[0] * heads, num_sms(q.device))
    per_tile = queries_a_tile(rows.width, group, tile.block_m)
    bounded = {"maxnreg": tile.max_registers} if tile.max_registers else {}
    factor, cap = scales(scale, softcap, k_scale)
    prefill_kernel[(_num_tiles(rows, q.shape[0], per_tile), kv_heads)](
        q, pool, rows.slots, rows.starts, rows.slots if rows.offsets is None else rows.offsets, rows.block_tables,
        out if sinks is None else sinks, out, factor, cap, v_scale, q.stride(0), rows.block_tables.stride(0),
        rows.num_rows, q.shape[0], W=rows.width, G=group, KVH=kv_heads, QT=per_tile, D=dim,
        BLOCK_D=next_power_of_2(dim), BLOCK_M=tile.block_m, BLOCK_N=tile.block_n, BLOCK_SIZE=rows.block_size,
        WINDOW=window or 0, CAPPED=softcap is not None, SINKS=sinks is not None, PRECISION=dot_precision(q.dtype),
        num_warps=tile.num_warps, num_stages=tile.num_stages, **bounded,
    )  # fmt: skip
    return out
