"""Attention of the persistent kernel: one split of a row's context a program, merged by the programs that need it."""

from __future__ import annotations

import triton
import triton.language as tl

from benchmarks.persistent.ops import as_operand, blocks_of, load_operand, prefetch_rows, rows_of, warps_of

LOG2E = tl.constexpr(1.4426950408889634)
FAR = tl.constexpr(-1e30)


@triton.jit
def split_tokens(length: tl.tensor, num_splits: tl.tensor, SPLIT: tl.constexpr) -> tl.tensor:
    """Tokens a split of a row's context takes: SPLIT, or more of it where the splits do not reach."""
    return tl.maximum((length + num_splits * SPLIT - 1) // (num_splits * SPLIT), 1) * SPLIT


@triton.jit
def key_blocks(tables: tl.tensor, table: tl.tensor, t: tl.tensor, end: tl.tensor, BLOCK: tl.constexpr) -> tl.tensor:
    """Block ids of the tokens at positions t < end."""
    return tl.load(tables + table + t // BLOCK, mask=t < end, other=0)


@triton.jit
def place_offsets(
    blocks: tl.tensor, t: tl.tensor, BLOCK: tl.constexpr, KV_HEADS: tl.constexpr, D: tl.constexpr
) -> tl.tensor:
    """Element offsets in the pool (int64: pools are large) of the tokens at positions t."""
    return (blocks.to(tl.int64) * BLOCK + t % BLOCK) * (2 * KV_HEADS * D)


@triton.jit
def open_item(
    item: tl.tensor,
    tables: tl.tensor,
    table_stride: tl.tensor,
    slots: tl.tensor,
    starts: tl.tensor,
    num_rows: tl.tensor,
    width: tl.tensor,
    num_splits: tl.tensor,
    HEADS: tl.constexpr,
    KV_HEADS: tl.constexpr,
    KS: tl.constexpr,
    TA: tl.constexpr,
    SPLIT: tl.constexpr,
    BLOCK: tl.constexpr,
) -> tl.tensor:
    """What an item of `attend` needs to know before it reads keys, none of it made by this launch.

    (row's start, its table's offset, first and last token of the split, block ids of the first tile's keys and values).
    """
    packs = (width * (HEADS // KV_HEADS) + 15) // 16
    row = item // (num_splits * packs * KV_HEADS)
    real = row < num_rows
    start = tl.load(starts + row, mask=real, other=0).to(tl.int32)
    table = tl.load(slots + row, mask=real, other=0).to(tl.int64) * table_stride
    length = start + width
    chunk = split_tokens(length, num_splits, SPLIT)
    begin = item % num_splits * chunk
    end = tl.where(real, tl.minimum(begin + chunk, length), 0)
    for_keys = key_blocks(tables, table, begin + warps_of(KS) * (TA * 8) + rows_of(0, TA), end, BLOCK)
    t = begin + tl.arange(0, KS)[:, None] * (TA * 8) + tl.arange(0, TA * 8)[None, :]
    return start, table, begin, end, for_keys, key_blocks(tables, table, t, end, BLOCK)


@triton.jit
def attend(
    item: tl.tensor,
    start: tl.tensor,
    table: tl.tensor,
    begin: tl.tensor,
    end: tl.tensor,
    key_ids: tl.tensor,
    value_ids: tl.tensor,
    q: tl.tensor,
    pool: tl.tensor,
    tables: tl.tensor,
    partial: tl.tensor,
    lse: tl.tensor,
    width: tl.tensor,
    num_splits: tl.tensor,
    scale: tl.tensor,
    HEADS: tl.constexpr,
    KV_HEADS: tl.constexpr,
    D: tl.constexpr,
    DB: tl.constexpr,
    KS: tl.constexpr,
    TA: tl.constexpr,
    BLOCK: tl.constexpr,
    PREC: tl.constexpr,
) -> None:
    """One item: 16 packed queries (query j of the row, head i of the group at j * group + i) over one split of a row.

    Each warp has its own 8 TA tokens of every tile and its own running softmax (Milakov and Gimelshein 2018); they are
    merged once, at the end, as splits are in Flash-Decoding (Dao et al. 2023). From `open_item`: start … value_ids.
    """
    GROUP: tl.constexpr = HEADS // KV_HEADS
    TW: tl.constexpr = TA * 8
    WIDE: tl.constexpr = DB * 32
    packs = (width * GROUP + 15) // 16
    split = item % num_splits
    pack = item // num_splits % packs
    head0 = item // (num_splits * packs) % KV_HEADS
    row = item // (num_splits * packs * KV_HEADS)
    if begin < end:
        i5 = rows_of(pack * 16, 2)
        q5 = ((row * width + i5 // GROUP) * HEADS + head0 * GROUP + i5 % GROUP) * D
        queries = load_operand(q, q5, i5 < width * GROUP, 0, D, DB, KS, False, True)
        queries = as_operand(queries, 2, DB, KS)
        i = pack * 16 + tl.arange(0, 16)
        ks = tl.arange(0, KS)
        d = tl.arange(0, WIDE)
        top = tl.full([KS, 16], FAR, tl.float32)
        mass = tl.zeros([KS, 16], tl.float32)
        out = tl.zeros([KS, 16, WIDE], tl.float32)
        for t0 in range(begin, end, KS * TW):
            t5 = t0 + warps_of(KS) * TW + rows_of(0, TA)
            at = place_offsets(key_ids, t5, BLOCK, KV_HEADS, D) + head0 * D
            keys = load_operand(pool, at, t5 < end, 0, D, DB, KS, False, True).to(q.dtype.element_ty)
            t2 = t0 + ks[:, None] * TW + tl.arange(0, TW)[None, :]
            at = place_offsets(value_ids, t2, BLOCK, KV_HEADS, D) + (KV_HEADS + head0) * D
            values = tl.load(
                pool + at[:, :, None] + d[None, None, :],
                mask=(t2 < end)[:, :, None] & (d < D)[None, None, :],
                other=0.0,
                cache_modifier=".cg",
            ).to(q.dtype.element_ty)
            key_ids = key_blocks(tables, table, t5 + KS * TW, end, BLOCK)
            value_ids = key_blocks(tables, table, t2 + KS * TW, end, BLOCK)
            keys = tl.permute(as_operand(keys, TA, DB, KS), (0, 2, 1))
            scores = tl.dot(queries, keys, input_precision=PREC) * (scale * LOG2E)
            seen = (t2[:, None, :] <= (start + i // GROUP)[None, :, None]) & (t2 < end)[:, None, :]
            scores = tl.where(seen, scores, FAR)
            new_top = tl.maximum(top, tl.max(scores, 2))
            p = tl.where(seen, tl.exp2(scores - new_top[:, :, None]), 0.0)
            fade = tl.exp2(top - new_top)
            mass = mass * fade + tl.sum(p, 2)
            out = out * fade[:, :, None] + tl.dot(p.to(q.dtype.element_ty), values, input_precision=PREC)
            top = new_top
        highest = tl.max(top, 0)
        share = tl.exp2(top - highest[None, :])
        total = tl.maximum(tl.sum(mass * share, 0), 1e-30)
        mixed = tl.sum(out * share[:, :, None], 0) / total[:, None]
        head = head0 * GROUP + i % GROUP
        token = split * 16 + row * width + i // GROUP
        real = i < width * GROUP
        tl.store(
            partial + ((token * HEADS + head) * D)[:, None] + d[None, :],
            mixed.to(partial.dtype.element_ty),
            mask=real[:, None] & (d < D)[None, :],
        )
        tl.store(lse + token * HEADS + head, highest + tl.log2(total), mask=real)


@triton.jit
def merge_splits(
    partial: tl.tensor,
    lse: tl.tensor,
    used: tl.tensor,
    most: tl.tensor,
    k0: tl.tensor,
    K: tl.constexpr,
    D: tl.constexpr,
    KB: tl.constexpr,
    KS: tl.constexpr,
    UNROLL: tl.constexpr,
) -> tl.tensor:
    """Attention outputs [2, KB, KS, 8, 32] in the model's dtype; token t has `used[t]` splits, at most `most`."""
    HEADS: tl.constexpr = K // D
    token = rows_of(0, 2)
    kb, ks = blocks_of(KB), warps_of(KS)
    e = tl.arange(0, 32)[None, None, None, None, :]
    head = (k0 + (kb * KS + ks) * 32 + e) // D
    if D % 32 == 0:
        head = (k0 + (kb * KS + ks) * 32) // D
    best = token * 0.0 + head * 0.0 + FAR
    mass = best * 0.0
    acc = mass + kb * 0.0 + e * 0.0
    for s0 in range(0, most, UNROLL):
        for u in tl.static_range(UNROLL):
            s = s0 + u
            ok = s < used
            score = tl.load(
                lse + (s * 16 + token) * HEADS + head, mask=ok & (head < HEADS), other=FAR, cache_modifier=".cg"
            )
            one = load_operand(partial, (s * 16 + token) * K, ok, k0, K, KB, KS, True, True).to(tl.float32)
            new = tl.maximum(best, score)
            fade = tl.exp2(best - new)
            weight = tl.where(ok, tl.exp2(score - new), 0.0)
            acc = acc * fade + one * weight
            mass = mass * fade + weight
            best = new
    return (acc / tl.maximum(mass, 1e-30)).to(partial.dtype.element_ty)


@triton.jit
def used_splits(
    starts: tl.tensor, width: tl.tensor, num_tokens: tl.tensor, num_splits: tl.tensor, SPLIT: tl.constexpr
) -> tl.tensor:
    """(splits of each token's row as [2, 1, 1, 8, 1], the most of any row)."""
    token = rows_of(0, 2)
    ok = token < num_tokens
    length = tl.load(starts + token // width, mask=ok, other=0).to(tl.int32) + width
    chunk = split_tokens(length, num_splits, SPLIT)
    used = tl.where(ok, (length + chunk - 1) // chunk, 0)
    return used, tl.max(tl.reshape(used, (16,)), 0)


@triton.jit
def prefetch_keys(
    item: tl.tensor,
    ids: tl.tensor,
    begin: tl.tensor,
    end: tl.tensor,
    pool: tl.tensor,
    width: tl.tensor,
    num_splits: tl.tensor,
    HEADS: tl.constexpr,
    KV_HEADS: tl.constexpr,
    D: tl.constexpr,
    KS: tl.constexpr,
    TW: tl.constexpr,
    BLOCK: tl.constexpr,
    LINE: tl.constexpr,
) -> None:
    """Asks for an item's first keys and values (`ids` [KS, TW] of open_item) to be brought to L2."""
    packs = (width * (HEADS // KV_HEADS) + 15) // 16
    head = item // (num_splits * packs) % KV_HEADS
    t = begin + tl.arange(0, KS)[:, None] * TW + tl.arange(0, TW)[None, :]
    at = tl.reshape(place_offsets(ids, t, BLOCK, KV_HEADS, D) + head * D, (KS * TW,))
    ok = tl.reshape(t < end, (KS * TW,))
    prefetch_rows(pool, at, ok, D, LINE)
    prefetch_rows(pool, at + KV_HEADS * D, ok, D, LINE)
