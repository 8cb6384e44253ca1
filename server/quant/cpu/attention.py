"""Rotary embedding and causal attention over the paged pool, float32.

Queries are the lanes: up to 8 pairs of (token, head of a group) of one row share a key head, and a key's number is
broadcast to all of them. So every query's scores, weights and sums run in the order of the keys, alone, whatever lanes
lie beside it: a token gets the same bits when decoded, verified or prefilled in any chunks. No key that a lane must not
see changes a bit of it, and no place that is not the row's is read.
"""

from __future__ import annotations

import numpy as np
from llvmlite import ir
from numba.core import cgutils

from server.quant.cpu.vectors import F32, I32, I64, Emitter, addresses, jit, kernel

WIDTH = 8
"""Queries that are computed together, and keys that are scored together."""
_FLOATS, _INTS = ir.VectorType(F32, WIDTH), ir.VectorType(I32, WIDTH)
_STEP = WIDTH * 4


@kernel(addresses(3))
def rotate_16(e: Emitter, x: ir.Value, rotation: ir.Value, out: ir.Value) -> None:
    """out = x rotated: 8 pairs that lie side by side, by 8 complex numbers."""
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
    limits [2, 8] int32: first and last key that a lane sees. out [keys, 8]; largest [8] is brought up to date.
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
        e.store(score, out, b.mul(b.add(first, I64(i)), I64(_STEP)))
    e.store(best, largest)


@kernel(addresses(4))
def soften(e: Emitter, scores: ir.Value, count: ir.Value, largest: ir.Value, total: ir.Value) -> None:
    """scores [count, 8] become exp(score - largest [8]); total [8] is their sum over the keys."""
    b = e.b
    best, sums = e.load(largest, 0, _FLOATS), e.variable(e.full(F32, WIDTH, 0.0))
    with cgutils.for_range(b, count) as loop:
        at = b.mul(loop.index, I64(_STEP))
        weight = e.exp(b.fsub(e.load(scores, at, _FLOATS), best))
        e.store(weight, scores, at)
        b.store(b.fadd(b.load(sums), weight), sums)
    e.store(b.load(sums), total)


@kernel(addresses(7))
def mix_8(
    e: Emitter,
    weights: ir.Value,
    count: ir.Value,
    values: ir.Value,
    stride: ir.Value,
    places: ir.Value,
    total: ir.Value,
    out: ir.Value,
) -> None:
    """out [8 numbers, 8 lanes] = sum over keys of weights [count, 8] times 8 numbers of each value, over total [8]."""
    b = e.b
    sums = [e.variable(e.full(F32, WIDTH, 0.0)) for _ in range(WIDTH)]
    with cgutils.for_range(b, count) as loop:
        weight = e.load(weights, b.mul(loop.index, I64(_STEP)), _FLOATS)
        row = b.add(values, b.mul(e.load(places, b.mul(loop.index, I64(8)), I64), stride))
        for i, total_i in enumerate(sums):
            b.store(e.fma(weight, e.splat(e.load(row, 4 * i, F32), WIDTH), b.load(total_i)), total_i)
    whole = e.load(total, 0, _FLOATS)
    for i, total_i in enumerate(sums):
        e.store(b.fdiv(b.load(total_i), whole), out, i * _STEP)


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
def attend(qkv, out, first, lanes, position, window, group, head, heads, width, dim, keys, values, stride, places, work):
    """Up to 8 queries of one row and key head.

    Lane i is query `first + i`, counted as token * group + head of the group; the row's first token is row 0 of qkv
    [tokens, width] and out [tokens, heads, dim] and sits at `position`. `keys` and `values`: addresses of this head's
    in the pool's first place. `window`: keys that a token sees, 0 for all. `work`: scratch, float32.
    """
    scale = np.float32(1.0) / np.sqrt(np.float32(dim))
    queries, mixed, small = work[: dim * 8], work[dim * 8 : dim * 16], work[dim * 16 : dim * 16 + 32]
    limits, scores = small[16:32].view(np.int32), work[dim * 16 + 32 :]
    for lane in range(8):
        this = first + min(lane, lanes - 1)  # lanes that are not used do what the last one does
        token = this // group
        limits[8 + lane] = position + token
        limits[lane] = max(0, position + token - window + 1) if window else 0
        small[lane] = -np.inf
        source = token * width + (head * group + this % group) * dim
        for d in range(dim):
            queries[d * 8 + lane] = qkv[source + d] * scale
    begin, last = limits[0], limits[15]
    begin = begin // 8 * 8
    score_at, large, total = scores.ctypes.data, small.ctypes.data, small.ctypes.data + 32
    for key in range(begin, last + 1, 8):
        to = score_at - begin * 32
        score_8(queries.ctypes.data, dim, keys, stride, places, key, last, limits.ctypes.data, to, large)
    count = last + 1 - begin
    soften(score_at, count, large, total)
    for d in range(0, dim, 8):
        to = mixed.ctypes.data + d * 32
        mix_8(score_at, count, values + d * 4, stride, places + begin * 8, total, to)
    for lane in range(lanes):
        this = first + lane
        target = (this // group * heads + head * group + this % group) * dim
        for d in range(dim):
            out[target + d] = mixed[d * 8 + lane]


def work_size(dim: int, max_tokens: int) -> int:
    """Numbers of scratch that `attend` needs."""
    return dim * 16 + 32 + (max_tokens + 2 * WIDTH) * WIDTH
