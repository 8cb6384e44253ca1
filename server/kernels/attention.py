"""Paged attention for decoding and verifying: 1 … 16 query tokens a row against the row's whole context.

Bandwidth decides, so every key and value is read once: the queries of a row and the heads of a group are packed into
one tile, and the context is split among programs (Flash-Decoding). In deterministic mode the context is cut at fixed
positions and partial results are put together in order, so that a token's bits depend on nothing but what it sees.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from server.kernels.attention_decode import decode_kernel, reduce_kernel
from server.kernels.attention_plan import (
    Splits,
    Tile,
    Workspace,
    decode_tile,
    partials_needed,
    plan_splits,
    queries_a_tile,
)
from server.kernels.paged import PagedRows
from server.kernels.runtime import ceil_div, dot_precision, next_power_of_2

__all__ = ["Splits", "Tile", "Workspace", "attention_reference", "decode_attention", "plan_splits"]


@dataclass(frozen=True, slots=True)
class Scores:
    """How query-key products become weights, and what float8 keys and values are worth."""

    scale: float
    window: int | None = None
    softcap: float | None = None
    sinks: Tensor | None = None
    k_scale: float = 1.0
    v_scale: float = 1.0
    first: Tensor | None = None


MAX_WIDTH = 16
HEAD_DIMS = (64, 96, 128, 256)
LOG2_E = 1.4426950408889634
_POOL_DTYPES = (torch.bfloat16, torch.float16, torch.float32)
_TAIL_TILES = 2
_REDUCE_VALUES = {1: 128, 2: 128, 4: 128, 8: 32}
"""Float32 values of partial results that a thread reads at once, by warps a program: registers bound them."""
_REDUCE_ROWS = 4
_REDUCE_WARPS = 4
_REDUCE_RUNS = 16


def check_operands(q: Tensor, pool: Tensor, rows: PagedRows, out: Tensor | None) -> tuple[int, int, int]:
    """(heads, key heads, head_dim). Raises ValueError for shapes, strides or dtypes that the kernels cannot take."""
    num_tokens, heads, dim = q.shape
    kv_heads = pool.shape[1] // 2
    if dim not in HEAD_DIMS or pool.shape[2] != dim or heads % kv_heads or heads // kv_heads > MAX_WIDTH:
        raise ValueError(
            f"q {list(q.shape)} does not fit pool {list(pool.shape)}: head sizes {HEAD_DIMS}, groups to 16"
        )
    if q.stride(1) != dim or q.stride(2) != 1 or not pool.is_contiguous():
        raise ValueError("the heads of a query token must lie side by side, and the pool must be contiguous")
    if q.dtype not in _POOL_DTYPES or pool.dtype not in (q.dtype, torch.float8_e4m3fn):
        raise ValueError(f"q {q.dtype} and pool {pool.dtype}: the pool has q's dtype or float8_e4m3fn")
    if rows.block_size & (rows.block_size - 1) or rows.block_tables.stride(1) != 1:
        raise ValueError(f"block_size {rows.block_size} must be a power of two, and block tables' lines contiguous")
    if out is not None and (out.shape != (num_tokens, heads * dim) or not out.is_contiguous()):
        raise ValueError(f"out {list(out.shape)} must be contiguous [{num_tokens}, {heads * dim}]")
    return heads, kv_heads, dim


def scales(scale: float, softcap: float | None, k_scale: float) -> tuple[float, float]:
    """What scores are multiplied by, and the cap, for base 2; see `scores_of`. Raises ValueError for a scale <= 0."""
    if scale * k_scale <= 0.0:
        raise ValueError(f"scale {scale}, k_scale {k_scale}: the largest score is looked for before scaling")
    if softcap is None:
        return scale * k_scale * LOG2_E, 0.0
    return 2.0 * LOG2_E * scale * k_scale / softcap, softcap * LOG2_E


def reduce_shape(packed: int, block_d: int, limit: int, num_warps: int) -> tuple[int, int]:
    """(BLOCK_R, BLOCK_S): packed query rows, and partial results of each, of one step of the reduction."""
    block_r = min(next_power_of_2(packed), limit)
    at_once = max(1, _REDUCE_VALUES[num_warps] * 32 * num_warps // (block_r * block_d))
    return block_r, min(at_once, _REDUCE_RUNS)


def decode_attention(
    q: Tensor,
    pool: Tensor,
    rows: PagedRows,
    *,
    scale: float,
    splits: Splits,
    workspace: Workspace | None = None,
    window: int | None = None,
    softcap: float | None = None,
    sinks: Tensor | None = None,
    k_scale: float = 1.0,
    v_scale: float = 1.0,
    out: Tensor | None = None,
    pdl: bool = False,
    settled: bool = False,
    tile: Tile | None = None,
    first: Tensor | None = None,
) -> Tensor:
    """Causal attention of q [R * W, heads, head_dim] over the paged pool -> [R * W, heads * head_dim], q's dtype.

    `rows.width` W is 1 … 16. q may be a view with any distance between tokens. `pool` [places, 2 * kv_heads, head_dim]
    holds the queries' own keys and values already; float8 keys and values are worth `k_scale` and `v_scale` times what
    they say. `window`: a query at p sees positions above p - window. `softcap`: softcap * tanh(score / softcap).
    `sinks` [heads]: one more score a head, without a value. `first` [R] int64, none of them behind `starts`: row r sees
    no position before `first[r]`, whatever is there. `workspace` may be missing where `splits.partials` is 1.
    `pdl`: launched while the kernel before still runs, whose results are waited for; with `settled` the rows' own
    tensors, and keys and values at positions before `starts`, were complete before that kernel began, and are read
    earlier. `out` may be given.

    Raises ValueError for operands that do not fit each other or the kernel, or a workspace that is too small.
    """
    if not 1 <= rows.width <= MAX_WIDTH:
        raise ValueError(f"rows of {rows.width} query tokens: decode_attention takes 1 to {MAX_WIDTH}")
    if q.shape[0] != rows.num_rows * rows.width:
        raise ValueError(f"{q.shape[0]} query tokens for {rows.num_rows} rows of {rows.width}")
    heads, kv_heads, dim = check_operands(q, pool, rows, out)
    group = heads // kv_heads
    tile = tile or decode_tile(rows.width, group, dim, q.dtype, pool.dtype, splits.deterministic)
    if splits.num_splits > 1:
        if workspace is None:
            raise ValueError("splits need a workspace")
        needed = partials_needed(rows.num_rows, rows.width, heads, kv_heads, splits, tile.block_m)
        workspace.check(needed, dim, rows.num_rows * heads * rows.width)
    if out is None:
        out = torch.empty(q.shape[0], heads * dim, dtype=q.dtype, device=q.device)
    if first is not None and first.shape != rows.starts.shape:
        raise ValueError(f"first {list(first.shape)} must be one position a row, {list(rows.starts.shape)}")
    how = Scores(scale, window, softcap, sinks, k_scale, v_scale, first)
    launch(q, pool, rows, how, splits, workspace, out, tile, pdl, settled)
    return out


def launch(
    q: Tensor,
    pool: Tensor,
    rows: PagedRows,
    how: Scores,
    splits: Splits,
    workspace: Workspace | None,
    out: Tensor,
    tile: Tile,
    pdl: bool = False,
    settled: bool = False,
) -> None:
    """Launches the kernels on operands that have been checked; ragged rows need `splits.num_splits` 1."""
    heads, kv_heads, dim = q.shape[1], pool.shape[1] // 2, q.shape[2]
    group = heads // kv_heads
    per_tile = queries_a_tile(rows.width, group, tile.block_m)
    query_tiles = ceil_div(rows.width or rows.max_width, per_tile)
    block_d = next_power_of_2(dim)
    split = splits.num_splits > 1
    warps = tile.num_warps if splits.fused else _REDUCE_WARPS
    limit = tile.block_m if splits.fused else _REDUCE_ROWS
    block_r, block_s = reduce_shape(per_tile * group, block_d, limit, warps)
    fixed = splits.split_tokens // tile.block_n if splits.split_tokens else 0
    factor, cap = scales(how.scale, how.softcap, how.k_scale)
    space = (workspace.weighted, workspace.maxima, workspace.sums, workspace.counters) if workspace else (out,) * 4
    shape = {"W": rows.width, "G": group, "KVH": kv_heads, "QT": per_tile, "D": dim, "BLOCK_D": block_d}
    cutting = {"BLOCK_N": tile.block_n, "WINDOW": how.window or 0, "FIXED": fixed}
    reducing = {"SINKS": how.sinks is not None, "BLOCK_R": block_r, "BLOCK_S": block_s, "PDL": pdl}
    reducing["BOUNDED"] = how.first is not None
    options: dict[str, int] = {"launch_pdl": True} if pdl else {}
    bounded = {"maxnreg": tile.max_registers} if tile.max_registers else {}
    tail = _TAIL_TILES * tile.block_n if settled and tile.early and not splits.deterministic else 0
    sinks = out if how.sinks is None else how.sinks
    decode_kernel[(kv_heads * query_tiles, splits.num_splits, rows.num_rows)](
        q, pool, rows.slots, rows.starts, rows.slots if rows.offsets is None else rows.offsets, rows.block_tables,
        sinks, out, *space, factor, cap, how.v_scale, q.stride(0), rows.block_tables.stride(0), splits.partials,
        splits.min_tiles, splits.whole_tiles, q.shape[0], how.first, **shape, **cutting, **reducing,
        BLOCK_M=tile.block_m, BLOCK_SIZE=rows.block_size, CAPPED=how.softcap is not None, SPLIT=split,
        FUSED=splits.fused, PRECISION=dot_precision(q.dtype), SETTLED=settled, TAIL=tail, num_warps=tile.num_warps,
        num_stages=tile.num_stages, **bounded, **options,
    )  # fmt: skip
    if split and not splits.fused:
        reduce_kernel[(kv_heads * query_tiles, ceil_div(per_tile * group, block_r), rows.num_rows)](
            rows.starts, sinks, out, *space[:3], how.v_scale, splits.partials, splits.num_splits, splits.min_tiles,
            splits.whole_tiles, how.first, **shape, **cutting, **reducing, num_warps=_REDUCE_WARPS, **options,
        )  # fmt: skip


def attention_reference(
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
    first: Tensor | None = None,
    dtype: torch.dtype = torch.float64,
) -> Tensor:
    """What the kernels compute, spelled out row by row in `dtype`; tokens behind the last row's give zeros."""
    num_tokens, heads, dim = q.shape
    kv_heads = pool.shape[1] // 2
    out = q.new_zeros(num_tokens, heads, dim)
    for r, (slot, start) in enumerate(zip(rows.slots.tolist(), rows.starts.tolist(), strict=True)):
        begin, behind = (r * rows.width, (r + 1) * rows.width)
        if rows.offsets is not None:
            begin, behind = rows.offsets[r : r + 2].tolist()
        position = torch.arange(start + behind - begin, device=q.device)
        blocks = rows.block_tables[slot, position // rows.block_size].long()
        seen = pool[blocks * rows.block_size + position % rows.block_size].to(dtype)
        key, value = seen.repeat_interleave(heads // kv_heads, dim=1).chunk(2, dim=1)
        scores = torch.einsum("qhd,khd->hqk", q[begin:behind].to(dtype), key) * (scale * k_scale)
        if softcap is not None:
            scores = softcap * torch.tanh(scores / softcap)
        at = position[start:, None]
        hidden = position > at
        if window is not None:
            hidden = hidden | (position <= at - window)
        if first is not None:
            hidden = hidden | (position < first[r])
        scores = scores.masked_fill(hidden, float("-inf"))
        if sinks is not None:
            scores = torch.cat((scores, sinks.to(dtype)[:, None, None].expand(heads, behind - begin, 1)), dim=2)
        weights = scores.softmax(dim=2)[:, :, : len(position)]
        out[begin:behind] = (torch.einsum("hqk,khd->qhd", weights, value) * v_scale).to(q.dtype)
    return out.view(num_tokens, heads * dim)
