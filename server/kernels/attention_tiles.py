"""The Triton side of paged attention: the tile loop, split-KV and its reduction.

A tile is BLOCK_N tokens of the row, cut from position 0. A program takes up to BLOCK_M packed query rows (packed row i
is query i // G of head i % G of one key head's group) and a run of tiles, and keeps (m, z, acc): the largest score, the
sum of weights relative to it, and the weighted values, all in base 2 (FlashAttention, arXiv 2205.14135; split over keys
as in Flash-Decoding). Runs are put together in order by `merge`.

Bits: where a multiplication feeds an addition, `tl.fma` says so, and the compiler has nothing left to choose. A tile
that a query cannot see leaves its (m, z, acc) exactly as they are: m stays, the sums are multiplied by 1, zeros added.
"""

from __future__ import annotations

import triton
import triton.language as tl

LOG2_E = tl.constexpr(1.4426950408889634)


@triton.jit
def scores_of(q, k, scale, softcap, CAPPED: tl.constexpr, PRECISION: tl.constexpr):
    """Scores [M, N] of k [D, N], and what they are to be multiplied by for base 2: `scale`, positive.

    CAPPED: softcap * tanh(x), with 2 log2(e) / softcap folded into `scale`; nothing is left to multiply by.
    """
    s = tl.dot(q, k, input_precision=PRECISION)
    factor = scale
    if CAPPED:
        s = softcap * (1.0 - 2.0 / (1.0 + tl.exp2(s * scale)))
        factor = 1.0
    return s, factor


@triton.jit
def softmax_step(s, factor, v, m, z, acc, MASKED: tl.constexpr, PRECISION: tl.constexpr):
    """One tile of online softmax; rows that have seen nothing yet keep m = -inf, z = 0, acc = 0.

    The largest score is found before the multiplication by `factor`, which then costs nothing: it is part of the
    subtraction. MASKED False: every row sees something.
    """
    top = tl.maximum(m, tl.max(s, 1) * factor)
    safe = top
    if MASKED:
        safe = tl.where(top == float("-inf"), 0.0, top)
    keep = tl.exp2(m - safe)
    p = tl.exp2(tl.fma(s, factor, -safe[:, None]))
    z = tl.fma(z, keep, tl.sum(p, 1))
    acc = tl.dot(p.to(v.dtype), v, acc * keep[:, None], input_precision=PRECISION)
    return top, z, acc


@triton.jit
def entries(table, tile, length, BLOCK_N: tl.constexpr, BLOCK_SIZE: tl.constexpr):
    """Block table entries of the tokens of `tile`, [BLOCK_N]; behind `length`, that of its last token.

    No mask and no token in the address: threads that hold several tokens of a block read its entry once.
    """
    last = (length - 1) // BLOCK_SIZE
    if BLOCK_SIZE >= BLOCK_N:
        at = tl.minimum(tile * BLOCK_N // BLOCK_SIZE, last) + tl.zeros([BLOCK_N], tl.int32)
    else:
        at = tl.minimum(tile * (BLOCK_N // BLOCK_SIZE) + tl.arange(0, BLOCK_N) // BLOCK_SIZE, last)
    return tl.load(table + at)


@triton.jit
def attend(
    q, at, m, z, acc, table, keys, begin, end, length, scale, softcap,
    TOKEN: tl.constexpr, D: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_SIZE: tl.constexpr,
    WINDOW: tl.constexpr, CAPPED: tl.constexpr, MASKED: tl.constexpr, PRECISION: tl.constexpr,
    bound=0, BOUNDED: tl.constexpr = False,
):  # fmt: skip
    """Tiles begin … end - 1 of one row and key head; MASKED False: every query sees every token of them.

    Places behind `length` are never read: they may hold anything, NaN too. BOUNDED (and MASKED): no token before
    `bound` is seen.
    """
    entry = entries(table, begin, length, BLOCK_N, BLOCK_SIZE)
    return attend_from(
        q, at, m, z, acc, table, entry, keys, begin, end, length, scale, softcap,
        TOKEN, D, BLOCK_D, BLOCK_N, BLOCK_SIZE, WINDOW, CAPPED, MASKED, PRECISION, bound, BOUNDED,
    )  # fmt: skip


@triton.jit
def attend_from(
    q, at, m, z, acc, table, entry, keys, begin, end, length, scale, softcap,
    TOKEN: tl.constexpr, D: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_SIZE: tl.constexpr,
    WINDOW: tl.constexpr, CAPPED: tl.constexpr, MASKED: tl.constexpr, PRECISION: tl.constexpr,
    bound=0, BOUNDED: tl.constexpr = False,
):  # fmt: skip
    """`attend`, with the block table entries of its first tile: who reads them early waits for them less."""
    d = tl.arange(0, BLOCK_D)
    inside = d < D
    within = (tl.arange(0, BLOCK_N) % BLOCK_SIZE)[:, None] * TOKEN + d[None, :]
    # Table entries are read one tile ahead into registers, so that the loads of keys and values, which the compiler
    # pipelines, wait for no other load.
    for tile in tl.range(begin, end):
        n = tile * BLOCK_N + tl.arange(0, BLOCK_N)
        block = keys + entry.to(tl.int64) * (BLOCK_SIZE * TOKEN)
        if BLOCK_SIZE > BLOCK_N:
            block += tile * BLOCK_N % BLOCK_SIZE * TOKEN
        entry = entries(table, tile + 1, length, BLOCK_N, BLOCK_SIZE)
        pointers = block[:, None] + within
        if MASKED:
            present = (n < length)[:, None] & inside[None, :]
            if BOUNDED:
                present = present & (n >= bound)[:, None]
            k = tl.load(pointers, mask=present, other=0.0)
            v = tl.load(pointers + TOKEN // 2, mask=present, other=0.0)
        elif D != BLOCK_D:
            k = tl.load(pointers, mask=inside[None, :], other=0.0)
            v = tl.load(pointers + TOKEN // 2, mask=inside[None, :], other=0.0)
        else:
            k = tl.load(pointers)
            v = tl.load(pointers + TOKEN // 2)
        s, factor = scores_of(q, tl.trans(k.to(q.dtype)), scale, softcap, CAPPED, PRECISION)
        if MASKED:
            seen = n[None, :] <= at[:, None]
            if WINDOW > 0:
                seen = seen & (n[None, :] > at[:, None] - WINDOW)
            if BOUNDED:
                seen = seen & (n >= bound)[None, :]
            s = tl.where(seen, s, float("-inf"))
        m, z, acc = softmax_step(s, factor, v.to(q.dtype), m, z, acc, MASKED, PRECISION)
    return m, z, acc


@triton.jit
def tail_places(table, tail, behind, TAIL: tl.constexpr, BLOCK_SIZE: tl.constexpr):
    """Places in the pool of tokens tail … behind - 1."""
    n = tail + tl.arange(0, TAIL)
    return tl.load(table + n // BLOCK_SIZE, mask=n < behind, other=0).to(tl.int64) * BLOCK_SIZE + n % BLOCK_SIZE


@triton.jit
def tail_tile(
    keys, place, k, v, tail, first, behind,
    TAIL: tl.constexpr, TOKEN: tl.constexpr, D: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """Reads tokens first … behind - 1 into k [BLOCK_D, TAIL] and v [TAIL, BLOCK_D], whose token n is tail + n.

    Past the first-level cache: where a kernel is still running, others may be writing to the same lines.
    """
    n = tail + tl.arange(0, TAIL)
    d = tl.arange(0, BLOCK_D)
    wanted = (n >= first) & (n < behind)
    k = tl.load(
        keys + place[None, :] * TOKEN + d[:, None],
        mask=wanted[None, :] & (d < D)[:, None],
        other=k,
        cache_modifier=".cg",
    )
    v = tl.load(
        keys + TOKEN // 2 + place[:, None] * TOKEN + d[None, :],
        mask=wanted[:, None] & (d < D)[None, :],
        other=v,
        cache_modifier=".cg",
    )
    return k, v


@triton.jit
def attend_tail(
    q, at, m, z, acc, k, v, tail, behind, scale, softcap,
    TAIL: tl.constexpr, WINDOW: tl.constexpr, CAPPED: tl.constexpr, PRECISION: tl.constexpr,
    bound=0, BOUNDED: tl.constexpr = False,
):  # fmt: skip
    """A run's last tokens, up to `behind`, as one tile that lies in registers: k [BLOCK_D, TAIL], v [TAIL, BLOCK_D]."""
    n = tail + tl.arange(0, TAIL)
    s, factor = scores_of(q, k.to(q.dtype), scale, softcap, CAPPED, PRECISION)
    seen = (n[None, :] <= at[:, None]) & (n < behind)[None, :]
    if WINDOW > 0:
        seen = seen & (n[None, :] > at[:, None] - WINDOW)
    if BOUNDED:
        seen = seen & (n >= bound)[None, :]
    return softmax_step(tl.where(seen, s, float("-inf")), factor, v.to(q.dtype), m, z, acc, True, PRECISION)


@triton.jit
def merge(m, z, acc, m2, z2, acc2):
    """(m, z, acc) of two runs of tiles put together, the earlier first."""
    top = tl.maximum(m, m2)
    safe = tl.where(top == float("-inf"), 0.0, top)
    keep, add = tl.exp2(m - safe), tl.exp2(m2 - safe)
    return top, tl.fma(z, keep, z2 * add), tl.fma(acc, keep[:, None], acc2 * add[:, None])


@triton.jit
def write(
    m, z, acc, out, sinks, token, head, valid, v_scale,
    H: tl.constexpr, D: tl.constexpr, BLOCK_D: tl.constexpr, SINKS: tl.constexpr,
):  # fmt: skip
    """Weighted values to `out`: packed row i is head[i] of token[i]. A sink is one more score, without a value."""
    if SINKS:
        sink = tl.load(sinks + head, mask=valid, other=0.0).to(tl.float32) * LOG2_E
        top = tl.maximum(m, sink)
        keep = tl.exp2(m - top)
        z = tl.fma(z, keep, tl.exp2(sink - top))
        acc = acc * keep[:, None]
    res = acc * (v_scale / tl.where(valid, z, 1.0))[:, None]
    d = tl.arange(0, BLOCK_D)
    where = out + token[:, None].to(tl.int64) * (H * D) + head[:, None] * D + d[None, :]
    tl.store(where, res.to(out.dtype.element_ty), mask=valid[:, None] & (d < D)[None, :])


@triton.jit
def read_queries(q, token, head, valid, q_stride, D: tl.constexpr, BLOCK_D: tl.constexpr):
    """Packed queries [M, BLOCK_D]: head[i] of token[i]; zeros where not `valid`."""
    d = tl.arange(0, BLOCK_D)
    where = q + token[:, None].to(tl.int64) * q_stride + head[:, None] * D + d[None, :]
    return tl.load(where, mask=valid[:, None] & (d < D)[None, :], other=0.0)


@triton.jit
def reduce_runs(
    part, maxima, sums, base, count, first, out, sinks, token, kv_head, query, width, v_scale,
    G: tl.constexpr, KVH: tl.constexpr, D: tl.constexpr, BLOCK_D: tl.constexpr, ROWS: tl.constexpr,
    BLOCK_R: tl.constexpr, BLOCK_S: tl.constexpr, SINKS: tl.constexpr,
):  # fmt: skip
    """Packed rows first … first + BLOCK_R - 1 of a query tile: `count` runs from `base` on, in order, by `merge`.

    BLOCK_S runs are read at once; one that is not there changes nothing, to the bit.
    """
    i = first + tl.arange(0, BLOCK_R)
    d = tl.arange(0, BLOCK_D)
    j = query + i // G
    valid = (i < ROWS) & (j < width)
    m = tl.full([BLOCK_R], float("-inf"), tl.float32)
    z = tl.zeros([BLOCK_R], tl.float32)
    acc = tl.zeros([BLOCK_R, BLOCK_D], tl.float32)
    for start in tl.range(0, count, BLOCK_S):
        for s in tl.static_range(BLOCK_S):
            there = valid & (start + s < count)
            at = (base + start + s).to(tl.int64) * ROWS + i
            # .cg: another multiprocessor has just written them, and the first-level cache is not coherent.
            m2 = tl.load(maxima + at, mask=there, other=float("-inf"), cache_modifier=".cg")
            z2 = tl.load(sums + at, mask=there, other=0.0, cache_modifier=".cg")
            whole = there[:, None] & (d < D)[None, :]
            acc2 = tl.load(part + at[:, None] * D + d[None, :], mask=whole, other=0.0, cache_modifier=".cg")
            m, z, acc = merge(m, z, acc, m2, z2, acc2)
    head = kv_head * G + i % G
    write(m, z, acc, out, sinks, token + j, head, valid, v_scale, KVH * G, D, BLOCK_D, SINKS)


@triton.jit
def zero_tail(
    out, token, behind, share, shares, kv_head,
    G: tl.constexpr, KVH: tl.constexpr, D: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_M: tl.constexpr,
):  # fmt: skip
    """Zeros for one key head's group of the padding tokens token … behind - 1; this program takes one of `shares`.

    Padding must stay finite: its keys and values of the next layer are written to block 0.
    """
    d = tl.arange(0, BLOCK_D)
    for at in tl.range(token + share * BLOCK_M, behind, shares * BLOCK_M):
        n = at + tl.arange(0, BLOCK_M)
        for g in tl.static_range(G):
            where = out + n[:, None].to(tl.int64) * (KVH * G * D) + (kv_head * G + g) * D + d[None, :]
            zeros = tl.zeros([BLOCK_M, BLOCK_D], out.dtype.element_ty)
            tl.store(where, zeros, mask=(n < behind)[:, None] & (d < D)[None, :])


@triton.jit
def cut(
    start, query, width, splits, min_tiles, whole_tiles,
    QT: tl.constexpr, BLOCK_N: tl.constexpr, WINDOW: tl.constexpr, FIXED: tl.constexpr,
    bound=0, BOUNDED: tl.constexpr = False,
):  # fmt: skip
    """How the queries query … query + QT - 1 of a row are served: (length, low, high, size, first, last, per, active).

    They see tokens before `length`, in tiles low … high - 1. Those are cut into runs first … last - 1 of `size` tiles,
    `per` to a program, for `active` programs. FIXED tiles make a run, counted from position 0; with FIXED 0 there are
    as many equal runs as programs, counted from `low`: fewer, where that would leave less than `min_tiles` to each, and
    one where all is no more than `whole_tiles`.
    """
    length = start + tl.minimum(width, query + QT)
    low = 0
    if WINDOW > 0:
        low = tl.maximum(start + query - WINDOW + 1, 0) // BLOCK_N
    if BOUNDED:
        low = tl.maximum(low, bound // BLOCK_N)
    high = tl.cdiv(length, BLOCK_N)
    if FIXED > 0:
        size = FIXED
        first = low // FIXED
        last = tl.cdiv(high, FIXED)
        per = tl.cdiv(last - first, splits)
        active = tl.cdiv(last - first, per)
    else:
        size = tl.maximum(tl.cdiv(high - low, splits), min_tiles)
        if high - low <= whole_tiles:
            size = tl.maximum(high - low, 1)
        first = 0
        last = tl.cdiv(high - low, size)
        per = 1
        active = last
    return length, low, high, size, first, last, per, active
