"""The kernels behind `decode_attention`: one program a (row, key head, query tile, split), and a second kernel that
adds partial results up where the first does not do it itself."""

from __future__ import annotations

import triton
import triton.language as tl

from server.kernels.attention_tiles import (
    attend,
    attend_from,
    attend_tail,
    cut,
    entries,
    merge,
    read_queries,
    reduce_runs,
    tail_places,
    tail_tile,
    write,
    zero_tail,
)


@triton.jit
def _store_run(part, maxima, sums, run, m, z, acc, i, d, D: tl.constexpr, ROWS: tl.constexpr):
    """One run's (m, z, acc) to the workspace: rows of `ROWS` packed queries, run by run."""
    at = run.to(tl.int64) * ROWS + i
    tl.store(maxima + at, m, mask=i < ROWS)
    tl.store(sums + at, z, mask=i < ROWS)
    tl.store(part + at[:, None] * D + d[None, :], acc, mask=(i < ROWS)[:, None] & (d < D)[None, :])


@triton.jit(do_not_specialize=["table_stride", "partials", "min_tiles", "whole_tiles", "num_tokens"])
def decode_kernel(
    q, pool, slots, starts, offsets, tables, sinks, out, part, maxima, sums, counters,
    scale, softcap, v_scale, q_stride, table_stride, partials, min_tiles,
    whole_tiles, num_tokens, bounds,
    W: tl.constexpr, G: tl.constexpr, KVH: tl.constexpr, QT: tl.constexpr,
    D: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_SIZE: tl.constexpr,
    WINDOW: tl.constexpr, CAPPED: tl.constexpr, SINKS: tl.constexpr, FIXED: tl.constexpr,
    SPLIT: tl.constexpr, FUSED: tl.constexpr, BLOCK_R: tl.constexpr, BLOCK_S: tl.constexpr, PRECISION: tl.constexpr,
    PDL: tl.constexpr, SETTLED: tl.constexpr, TAIL: tl.constexpr, BOUNDED: tl.constexpr,
):  # fmt: skip
    """Grid (key heads x query tiles, splits, rows). W 0: ragged rows, whose first tokens `offsets` names.

    The rows' own tensors are read before the queries, so that one does not wait for the other.
    TAIL: the last so many tokens of a run are one tile of their own, whose keys and values, as far as they are older
    than the row's queries, are read before the wait: 0 or two tiles, so that what is left before them is older.
    BOUNDED: no query sees a token before its row's `bounds`, else None; a row's first query sees one at least.
    """
    if PDL and not SETTLED:
        tl.extra.cuda.gdc_wait()
    ROWS: tl.constexpr = QT * G
    row = tl.program_id(2)
    start = tl.load(starts + row).to(tl.int32)
    table = tables + tl.load(slots + row) * table_stride
    if W > 0:
        token = row * W
        width = W
    else:
        token = tl.load(offsets + row)
        width = tl.load(offsets + row + 1) - token
    query_tiles = tl.num_programs(0) // KVH
    kv_head = tl.program_id(0) // query_tiles
    query = tl.program_id(0) % query_tiles * QT
    split = tl.program_id(1)
    if W == 0:  # noqa: SIM102  the outer condition is decided when compiling
        if row == tl.num_programs(2) - 1:
            share = tl.program_id(0) % query_tiles * tl.num_programs(1) + split
            shares = query_tiles * tl.num_programs(1)
            zero_tail(out, token + width, num_tokens, share, shares, kv_head, G, KVH, D, BLOCK_D, 16)
    if query >= width:
        return
    bound = 0
    if BOUNDED:
        bound = tl.load(bounds + row).to(tl.int32)
    length, low, high, size, first, last, per, active = cut(
        start, query, width, tl.num_programs(1), min_tiles, whole_tiles, QT, BLOCK_N, WINDOW, FIXED, bound, BOUNDED
    )
    if split >= active:
        return
    keys = pool + kv_head * D
    TOKEN: tl.constexpr = 2 * KVH * D
    begin = low + split * size
    end = tl.minimum(begin + size, high)
    if TAIL > 0:
        tail = tl.maximum(end * BLOCK_N - TAIL, begin * BLOCK_N)
        behind = tl.minimum(end * BLOCK_N, length)
        place = tail_places(table, tail, behind, TAIL, BLOCK_SIZE)
        k = tl.zeros([BLOCK_D, TAIL], pool.dtype.element_ty)
        v = tl.zeros([TAIL, BLOCK_D], pool.dtype.element_ty)
        early = tail
        if BOUNDED:
            early = tl.maximum(tail, bound)
        k, v = tail_tile(keys, place, k, v, tail, early, tl.minimum(start, behind), TAIL, TOKEN, D, BLOCK_D)
    elif FIXED == 0:
        entry = entries(table, begin, length, BLOCK_N, BLOCK_SIZE)
    if PDL:
        if SETTLED:
            tl.extra.cuda.gdc_wait()
        # Not before the wait: that is how the next attention may take tokens older than its own for written.
        tl.extra.cuda.gdc_launch_dependents()
    i = tl.arange(0, BLOCK_M)
    d = tl.arange(0, BLOCK_D)
    j = query + i // G
    head = kv_head * G + i % G
    valid = (i < ROWS) & (j < width)
    queries = read_queries(q, token + j, head, valid, q_stride, D, BLOCK_D)
    group = row * tl.num_programs(0) + tl.program_id(0)
    empty = tl.full([BLOCK_M], float("-inf"), tl.float32)
    m, z, acc = empty, tl.zeros([BLOCK_M], tl.float32), tl.zeros([BLOCK_M, BLOCK_D], tl.float32)
    if FIXED == 0:
        if TAIL > 0:
            k, v = tail_tile(keys, place, k, v, tail, tl.maximum(start, tail), behind, TAIL, TOKEN, D, BLOCK_D)
            m, z, acc = attend_tail(
                queries, start + j, m, z, acc, k, v, tail, behind, scale, softcap,
                TAIL, WINDOW, CAPPED, PRECISION, bound, BOUNDED,
            )  # fmt: skip
            end = tail // BLOCK_N
            entry = entries(table, begin, length, BLOCK_N, BLOCK_SIZE)
        if begin < end:
            m, z, acc = attend_from(
                queries, start + j, m, z, acc, table, entry, keys, begin, end, length, scale, softcap,
                TOKEN, D, BLOCK_D, BLOCK_N, BLOCK_SIZE, WINDOW, CAPPED, TAIL == 0 or WINDOW > 0 or BOUNDED, PRECISION,
                bound, BOUNDED,
            )  # fmt: skip
        if SPLIT and active > 1:
            _store_run(part, maxima, sums, group * partials + split, m, z, acc, i, d, D, ROWS)
    else:
        for run in range(first + split * per, tl.minimum(first + split * per + per, last)):
            m2, z2, acc2 = attend(
                queries, start + j, empty, tl.zeros([BLOCK_M], tl.float32), tl.zeros([BLOCK_M, BLOCK_D], tl.float32),
                table, keys, tl.maximum(run * size, low), tl.minimum(run * size + size, high), length, scale, softcap,
                TOKEN, D, BLOCK_D, BLOCK_N, BLOCK_SIZE, WINDOW, CAPPED, True, PRECISION, bound, BOUNDED,
            )  # fmt: skip
            if SPLIT and active > 1:
                _store_run(part, maxima, sums, group * partials + run - first, m2, z2, acc2, i, d, D, ROWS)
            else:
                m, z, acc = merge(m, z, acc, m2, z2, acc2)
    if not SPLIT or active == 1:
        write(m, z, acc, out, sinks, token + j, head, valid, v_scale, KVH * G, D, BLOCK_D, SINKS)
    elif FUSED:
        # All threads' partial results are stored before one thread counts the program in; the count releases them, and
        # acquires the others' for the last program.
        tl.debug_barrier()
        if tl.atomic_add(counters + group, 1, sem="acq_rel", scope="gpu") == active - 1:
            tl.store(counters + group, 0)
            reduce_runs(
                part, maxima, sums, group * partials, last - first, 0, out, sinks, token, kv_head, query, width,
                v_scale, G, KVH, D, BLOCK_D, ROWS, BLOCK_R, BLOCK_S, SINKS,
            )  # fmt: skip


@triton.jit(do_not_specialize=["partials", "splits", "min_tiles", "whole_tiles"])
def reduce_kernel(
    starts, sinks, out, part, maxima, sums, v_scale, partials, splits, min_tiles, whole_tiles, bounds,
    W: tl.constexpr, G: tl.constexpr, KVH: tl.constexpr, QT: tl.constexpr,
    D: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_N: tl.constexpr, WINDOW: tl.constexpr, SINKS: tl.constexpr,
    FIXED: tl.constexpr, BLOCK_R: tl.constexpr, BLOCK_S: tl.constexpr, PDL: tl.constexpr, BOUNDED: tl.constexpr,
):  # fmt: skip
    """Grid (key heads x query tiles, parts of BLOCK_R packed queries, rows): adds up what `decode_kernel` left."""
    if PDL:
        tl.extra.cuda.gdc_wait()
        tl.extra.cuda.gdc_launch_dependents()
    row = tl.program_id(2)
    start = tl.load(starts + row).to(tl.int32)
    query_tiles = tl.num_programs(0) // KVH
    kv_head = tl.program_id(0) // query_tiles
    query = tl.program_id(0) % query_tiles * QT
    bound = 0
    if BOUNDED:
        bound = tl.load(bounds + row).to(tl.int32)
    _, _, _, _, first, last, _, active = cut(
        start, query, W, splits, min_tiles, whole_tiles, QT, BLOCK_N, WINDOW, FIXED, bound, BOUNDED
    )
    if active == 1:
        return
    base = (row * tl.num_programs(0) + tl.program_id(0)) * partials
    reduce_runs(
        part, maxima, sums, base, last - first, tl.program_id(1) * BLOCK_R, out, sinks, row * W, kv_head, query, W,
        v_scale, G, KVH, D, BLOCK_D, QT * G, BLOCK_R, BLOCK_S, SINKS,
    )  # fmt: skip
