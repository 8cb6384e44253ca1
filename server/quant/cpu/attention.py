"""Rotary embedding and causal attention over the paged pool, float32.

Queries are the lanes: up to 8 pairs of (token, head of a group) of one row share a key head, and a key's number is
broadcast to all of them. So every query's scores, weights and sums run in the order of the keys, alone, whatever lanes
lie beside it: a token gets the same bits when decoded, verified or prefilled in any chunks. No key that a lane must not
see changes a bit of it, and no place that is not the row's is read.

Keys are taken in spans that begin at multiples of SPAN. Each gives a maximum, a sum and a mean of its own, and these
are merged from first to last (as flash decoding does, Dao et al. 2023): one thread may do all spans, or several one
each, with the same result. All heads of a span are done together, so that memory is read in the order in which it lies:
by one head at a time it comes at a fifth of the speed.
"""

from __future__ import annotations

import numpy as np
from llvmlite import ir
from numba.core import cgutils

from server.quant.cpu.vectors import F32, I8, I32, I64, Emitter, addresses, jit, kernel

WIDTH = 8
"""Queries that are computed together, and keys that are scored together."""
SPAN = 64
"""Keys whose scores are held at once."""
_AHEAD = 16  # keys
_NOTHING = -3.0e38  # the maximum of no scores: finite, so that differences are
_FLOATS, _INTS = ir.VectorType(F32, WIDTH), ir.VectorType(I32, WIDTH)
_STEP = WIDTH * 4


@kernel(addresses(3))
def rotate_16(e: Emitter, x: ir.Value, rotation: ir.Value, out: ir.Value) -> None:
    """Out = x rotated: 8 pairs that lie side by side, by 8 complex numbers."""
    kind = ir.VectorType(F32, 16)
    v, turn = e.load(x, 0, kind), e.load(rotation, 0, kind)
    cos = e.shuffle(turn, [i & ~1 for i in range(16)])
    sin = e.shuffle(turn, [i | 1 for i in range(16)])
    swapped = e.shuffle(v, [i ^ 1 for i in range(16)])
    signs = ir.Constant(kind, [-1.0, 1.0] * 8)
    e.store(e.fma(v, cos, e.b.fmul(e.b.fmul(swapped, sin), signs)), out)


@kernel(addresses(2))
def copy_16(e: Emitter, x: ir.Value, out: ir.Value) -> None:
    """16 numbers of 4 bytes."""
    e.store(e.load(x, 0, ir.VectorType(F32, 16)), out)


@kernel(addresses(5))
def fetch_8(e: Emitter, pool: ir.Value, stride: ir.Value, places: ir.Value, first: ir.Value, last: ir.Value) -> None:
    """Asks for whole places of 8 keys from `first` + _AHEAD on, none after `last`."""
    b = e.b
    for i in range(WIDTH):
        index = b.add(first, I64(i + _AHEAD))
        with b.if_then(b.icmp_signed("<=", index, last)):
            row = b.add(pool, b.mul(e.load(places, b.mul(index, I64(8)), I64), stride))
            with cgutils.for_range(b, b.lshr(stride, I64(6))) as loop:
                pointer = e.pointer(row, b.mul(loop.index, I64(64)), I8)
                e.call("llvm.prefetch.p0", ir.VoidType(), pointer, I32(0), I32(2), I32(1))


@kernel(addresses(10))
def score_8(
    e: Emitter,
    queries: ir.Value,
    dim: ir.Value,
    keys: ir.Value,
    stride: ir.Value,
    places: ir.Value,
    first: ir.Value,
    last: ir.Value,
    limits: ir.Value,
    out: ir.Value,
    largest: ir.Value,
) -> None:
    """Scores of keys `first` to `first + 8` for 8 lanes.

    queries [dim, 8]; a key is `stride` bytes times its place after `keys`; keys after `last` are read as the last.
    limits [2, 8] int32: first and last key that a lane sees. out [8 keys, 8]; largest [8] is brought up to date.
    """
    b = e.b
    rows = []
    for i in range(WIDTH):
        index = b.add(first, I64(i))
        index = b.select(b.icmp_signed("<", index, last), index, last)
        rows.append(b.add(keys, b.mul(e.load(places, b.mul(index, I64(8)), I64), stride)))
    sums = [e.variable(e.full(F32, WIDTH, 0.0)) for _ in range(WIDTH)]
    with cgutils.for_range(b, dim) as loop:
        query = e.load(queries, b.mul(loop.index, I64(_STEP)), _FLOATS)
        at = b.mul(loop.index, I64(4))
        for row, total in zip(rows, sums, strict=True):
            b.store(e.fma(query, e.splat(e.load(row, at, F32), WIDTH), b.load(total)), total)
    low, high = e.load(limits, 0, _INTS), e.load(limits, _STEP, _INTS)
    best = e.load(largest, 0, _FLOATS)
    for i, total in enumerate(sums):
        index = e.splat(b.trunc(b.add(first, I64(i)), I32), WIDTH)
        seen = b.and_(b.icmp_signed(">=", index, low), b.icmp_signed("<=", index, high))
        score = b.select(seen, b.load(total), e.full(F32, WIDTH, float("-inf")))
        best = e.maximum(best, score)
        e.store(score, out, i * _STEP)
    e.store(best, largest)


@kernel(addresses(3))
def soften(e: Emitter, scores: ir.Value, count: ir.Value, state: ir.Value) -> None:
    """Scores [count, 8] become exp(score - maximum). state [2, 8]: the maximum, and where their sum is put."""
    b = e.b
    best, sums = e.load(state, 0, _FLOATS), e.variable(e.full(F32, WIDTH, 0.0))
    with cgutils.for_range(b, count) as loop:
        at = b.mul(loop.index, I64(_STEP))
        weight = e.exp(b.fsub(e.load(scores, at, _FLOATS), best))
        e.store(weight, scores, at)
        b.store(b.fadd(b.load(sums), weight), sums)
    e.store(b.load(sums), state, _STEP)


@kernel(addresses(6))
def mix_8(
    e: Emitter, weights: ir.Value, count: ir.Value, values: ir.Value, stride: ir.Value, places: ir.Value, out: ir.Value
) -> None:
    """Out [8 numbers, 8 lanes] = sum over keys of weights [count, 8] times 8 numbers of each value."""
    b = e.b
    sums = [e.variable(e.full(F32, WIDTH, 0.0)) for _ in range(WIDTH)]
    with cgutils.for_range(b, count) as loop:
        weight = e.load(weights, b.mul(loop.index, I64(_STEP)), _FLOATS)
        row = b.add(values, b.mul(e.load(places, b.mul(loop.index, I64(8)), I64), stride))
        for i, total in enumerate(sums):
            b.store(e.fma(weight, e.splat(e.load(row, 4 * i, F32), WIDTH), b.load(total)), total)
    for i, total in enumerate(sums):
        e.store(b.load(total), out, i * _STEP)


@kernel(addresses(3))
def merge(e: Emitter, into: ir.Value, other: ir.Value, dim: ir.Value) -> None:
    """Two results [2 + dim, 8] (maximum, sum, sums of values) become that of the keys of both, in `into`."""
    b = e.b
    mine, theirs = e.load(into, 0, _FLOATS), e.load(other, 0, _FLOATS)
    best = e.maximum(mine, theirs)
    keep, take = e.exp(b.fsub(mine, best)), e.exp(b.fsub(theirs, best))
    e.store(best, into)
    with cgutils.for_range(b, b.add(dim, I64(1))) as loop:
        at = b.add(b.mul(loop.index, I64(_STEP)), I64(_STEP))
        e.store(e.fma(e.load(other, at, _FLOATS), take, b.fmul(e.load(into, at, _FLOATS), keep)), into, at)


@kernel(addresses(2))
def divide(e: Emitter, result: ir.Value, dim: ir.Value) -> None:
    """Sums of values of a result [2 + dim, 8] by its sum."""
    total = e.load(result, _STEP, _FLOATS)
    with cgutils.for_range(e.b, dim) as loop:
        at = e.b.add(e.b.mul(loop.index, I64(_STEP)), I64(2 * _STEP))
        e.store(e.b.fdiv(e.load(result, at, _FLOATS), total), result, at)


@jit
def rotate_head(x, rotation, out, dim):
    """One head of `dim` numbers."""
    for at in range(0, dim * 4, 64):
        rotate_16(x + at, rotation + at, out + at)


@jit
def write_token(qkv, heads, kv_heads, dim, rotation, place, rotates):
    """Rotates a token's queries in place, and writes its rotated keys and its values to the pool."""
    size = dim * 4
    if rotates:
        for head in range(heads):
            rotate_head(qkv + head * size, rotation, qkv + head * size, dim)
    keys = qkv + heads * size
    for head in range(kv_heads):
        if rotates:
            rotate_head(keys + head * size, rotation, place + head * size, dim)
        else:
            for at in range(0, size, 64):
                copy_16(keys + head * size + at, place + head * size + at)
    for at in range(kv_heads * size, 2 * kv_heads * size, 64):
        copy_16(keys + at, place + at)


@jit
def result_size(dim):
    """Numbers of one result [2 + dim, 8]."""
    return (dim + 2) * 8


@jit
def fill_queries(qkv, first, lanes, position, window, group, width, heads_of_keys, dim, queries, limits):
    """Queries of 8 lanes, transposed and scaled, for every key head: queries [key heads, dim, 8]; and their limits."""
    scale = np.float32(1.0) / np.sqrt(np.float32(dim))
    for lane in range(8):
        this = first + min(lane, lanes - 1)  # lanes that are not used see what the last one does
        token = this // group
        limits[lane] = max(0, position + token - window + 1) if window else 0
        limits[8 + lane] = position + token
    for head in range(heads_of_keys):
        for lane in range(lanes):
            this = first + lane
            source = this // group * width + (head * group + this % group) * dim
            target = head * dim * 8 + lane
            for d in range(dim):
                queries[target + d * 8] = qkv[source + d] * scale


@jit
def attend_span(queries, limits, begin, end, last, kv_heads, dim, pool, places, scores, results):
    """Keys `begin` to `end` of one row, for 8 lanes of every key head: results [key heads, 2 + dim, 8].

    `pool`: address of the layer's; `places`: of the row's; `last`: the last key there is; `scores`: scratch.
    """
    stride, size, one = 2 * kv_heads * dim * 4, dim * 4, result_size(dim)
    for head in range(kv_heads):
        for lane in range(8):
            results[head * one + lane] = -3.0e38
    for key in range(begin, end, 8):
        fetch_8(pool, stride, places, key, last)
        for head in range(kv_heads):
            score_8(
                queries.ctypes.data + head * dim * 32, dim, pool + head * size, stride, places, key, end - 1,
                limits.ctypes.data, scores.ctypes.data + (head * 64 + key - begin) * 32,
                results.ctypes.data + head * one * 4,
            )  # fmt: skip
    for head in range(kv_heads):
        weights, to = scores.ctypes.data + head * 64 * 32, results.ctypes.data + head * one * 4
        soften(weights, end - begin, to)
        values = pool + (kv_heads + head) * size
        for d in range(0, dim, 8):
            mix_8(weights, end - begin, values + d * 4, stride, places + begin * 8, to + 64 + d * 32)


@jit
def merge_into(results, others, kv_heads, dim):
    """`merge` for every key head."""
    one = result_size(dim) * 4
    for head in range(kv_heads):
        merge(results.ctypes.data + head * one, others.ctypes.data + head * one, dim)


@jit
def finish(results, out, first, lanes, group, heads, kv_heads, dim):
    """Results of 8 lanes to out [tokens, heads, dim]."""
    one = result_size(dim)
    for head in range(kv_heads):
        result = results[head * one : (head + 1) * one]
        divide(result.ctypes.data, dim)
        for lane in range(lanes):
            this = first + lane
            target = (this // group * heads + head * group + this % group) * dim
            for d in range(dim):
                out[target + d] = result[16 + d * 8 + lane]


def scratch_size(kv_heads: int, dim: int) -> int:
    """Numbers that one thread needs: queries, scores, limits, and two results."""
    return kv_heads * (dim + SPAN) * WIDTH + 2 * WIDTH + 2 * kv_heads * (dim + 2) * WIDTH


def results_size(kv_heads: int, dim: int, max_tokens: int) -> int:
    """Numbers of the results of all spans of 8 lanes."""
    return -(-max_tokens // SPAN) * kv_heads * (dim + 2) * WIDTH
