"""A whole step of a Llama network, run by several threads at once.

All threads call `run_step` with the same arguments but their own number. Tokens go through all layers in parts of
PART_TOKENS, which is the same function (a part sees the keys that earlier parts wrote) and keeps activations in the
cache. Between phases threads meet at a barrier; within one each has its share of tiles, groups of columns or queries.
"""

from __future__ import annotations

import numpy as np

from server.quant.cpu.activations import quantize_gated_rows, quantize_normed_rows, quantize_rows
from server.quant.cpu.attention import attend_span, fill_queries, finish, merge_into, result_size, write_token
from server.quant.cpu.barrier import wait
from server.quant.cpu.product import multiply
from server.quant.cpu.vectors import LANES, jit

PART_TOKENS = 128
"""Tokens that go through the layers together."""
FEW = 8
"""Blocks of queries up to which threads share the keys of one."""
(
    INPUT_NORM, POST_NORM, WINDOW, ROTATES, POOL, FEATURES,
    QKV, QKV_KIND, OUT, OUT_KIND, GATE_UP, GATE_UP_KIND, DOWN, DOWN_KIND, LAYER_FIELDS,
) = range(15)  # fmt: skip
"""Columns of `layers` [num_layers, LAYER_FIELDS] int64: addresses, kinds and numbers."""
ROW_START, ROW_TOKENS, ROW_POSITION, ROW_PLACES, ROW_FIELDS = range(5)
"""Columns of `rows` [R, ROW_FIELDS] int64: first token, tokens, position of the first, where its places begin."""

_LANES = LANES
_PART = PART_TOKENS
_FEW = FEW


@jit
def share(count, thread, threads):
    """First and end of a thread's part of `count` things."""
    return count * thread // threads, count * (thread + 1) // threads


@jit
def embed(values, scales, token_ids, x):
    """Rows `token_ids` [N] of values [V, H] int8 times scales [V, H / 32] float32, to x [N, H]."""
    for n in range(len(token_ids)):
        token = token_ids[n]
        for group in range(scales.shape[1]):
            for d in range(group * 32, group * 32 + 32):
                x[n, d] = values[token, d] * scales[token, group]


@jit
def linear(kind, weight, q, s, columns, outputs, out, step, rows, add, thread, threads):
    """This thread's tiles of a layer."""
    first, end = share(outputs // _LANES, thread, threads)
    multiply(kind, weight, q, s, columns // 32, out, step, rows, add, first, end)


@jit
def split(work, kv_heads, dim):
    """A thread's scratch: queries, limits, scores, two results."""
    a = kv_heads * dim * 8
    b = a + 16
    c = b + kv_heads * 64 * 8
    d = c + kv_heads * result_size(dim)
    return work[:a], work[a:b].view(np.int32), work[b:c], work[c:d], work[d:]


@jit
def attention(qkv, out, rows, places, begin, end, window, pool, shape, work, results, barrier, thread, threads):
    """Queries of tokens `begin` to `end` of the step, in blocks of 8 lanes of one row.

    Many blocks are dealt to the threads. Of few, spans of keys are, and merged when all are done: `results` holds
    those of FEW blocks.
    """
    heads, kv_heads, dim = shape[1], shape[2], shape[3]
    group, width = heads // kv_heads, (heads + 2 * kv_heads) * dim
    blocks = 0
    for r in range(len(rows)):
        blocks += (max(0, min(rows[r, 0] + rows[r, 1], end) - max(rows[r, 0], begin)) * group + 7) // 8
    few = threads > 1 and blocks <= _FEW
    size = kv_heads * result_size(dim)
    held = len(results) // _FEW
    queries, limits, scores, total, other = split(work, kv_heads, dim)
    for turn in range(2 if few else 1):
        block, spans = -1, 0
        for r in range(len(rows)):
            low, high = max(rows[r, 0], begin), min(rows[r, 0] + rows[r, 1], end)
            position, at = rows[r, 2] + low - rows[r, 0], low - begin
            table = places.ctypes.data + rows[r, 3] * 8
            for first in range(0, max(0, high - low) * group, 8):
                block += 1
                if (not few or turn == 1) and block % threads != thread:
                    continue
                lanes = min(8, (high - low) * group - first)
                last = position + (first + lanes - 1) // group
                start = (max(0, position + first // group - window + 1) if window else 0) // 64
                if turn == 0:
                    fill_queries(
                        qkv[at * width :], first, lanes, position, window, group, width, kv_heads, dim, queries, limits
                    )
                for span in range(start, last // 64 + 1):
                    spans += 1
                    if few:
                        other = results[block * held + span * size :]
                        if turn == 0 and spans % threads != thread:
                            continue
                    if turn == 0:
                        key = span * 64
                        attend_span(
                            queries, limits, key, min(key + 64, last + 1), last, kv_heads, dim, pool, table, scores,
                            other,
                        )  # fmt: skip
                        if few:
                            continue
                    if span == start:
                        total[:size] = other[:size]
                    else:
                        merge_into(total, other, kv_heads, dim)
                if turn == 1 or not few:
                    finish(total, out[at * heads * dim :], first, lanes, group, heads, kv_heads, dim)
        if few and turn == 0:
            wait(barrier, threads)


@jit
def run_layer(layer, shape, eps, x, rows, places, slots, positions, rotations, begin, end, buffers, barrier, me):
    """Tokens `begin` to `end` through one layer; x is their part."""
    hidden, heads, kv_heads, dim, inner = shape[0], shape[1], shape[2], shape[3], shape[4]
    q, s, qkv, mixed, wide, results, work = buffers
    thread, threads = me
    n, q_at, s_at, x_at = end - begin, q.ctypes.data, s.ctypes.data, x.ctypes.data
    qkv_width, mixed_width = (heads + 2 * kv_heads) * dim, heads * dim
    groups = hidden // 32
    first, last = share(n * groups, thread, threads)
    quantize_normed_rows(x_at, hidden * 4, layer[0], eps, groups, q_at, s_at, first, last)
    wait(barrier, threads)
    to = qkv.ctypes.data
    linear(layer[7], layer[6], q_at, s_at, hidden, qkv_width, to, qkv_width * 4, n, 0, thread, threads)
    wait(barrier, threads)
    first, last = share(n, thread, threads)
    for t in range(first, last):
        place = layer[4] + slots[begin + t] * 2 * kv_heads * dim * 4
        rotation = rotations + positions[begin + t] * dim * 4
        write_token(to + t * qkv_width * 4, heads, kv_heads, dim, rotation, place, layer[3])
    wait(barrier, threads)
    attention(qkv, mixed, rows, places, begin, end, layer[2], layer[4], shape, work, results, barrier, thread, threads)
    wait(barrier, threads)
    first, last = share(n * (mixed_width // 32), thread, threads)
    quantize_rows(mixed.ctypes.data, mixed_width * 4, mixed_width // 32, q_at, s_at, first, last)
    wait(barrier, threads)
    linear(layer[9], layer[8], q_at, s_at, mixed_width, hidden, x_at, hidden * 4, n, 1, thread, threads)
    wait(barrier, threads)
    first, last = share(n * groups, thread, threads)
    quantize_normed_rows(x_at, hidden * 4, layer[1], eps, groups, q_at, s_at, first, last)
    wait(barrier, threads)
    to = wide.ctypes.data
    linear(layer[11], layer[10], q_at, s_at, hidden, 2 * inner, to, inner * 8, n, 0, thread, threads)
    wait(barrier, threads)
    first, last = share(n * (inner // 32), thread, threads)
    quantize_gated_rows(to, inner // 32, q_at, s_at, first, last)
    wait(barrier, threads)
    linear(layer[13], layer[12], q_at, s_at, inner, hidden, x_at, hidden * 4, n, 1, thread, threads)
    wait(barrier, threads)


@jit
def run_head(x, at, norm, kind, weight, shape, eps, logits, q, s, barrier, thread, threads):
    """Logits [T, V] of the tokens `at` [T]."""
    hidden, vocabulary = shape[0], shape[5]
    groups = hidden // 32
    for begin in range(0, len(at), _PART):
        n = min(_PART, len(at) - begin)
        first, last = share(n, thread, threads)
        for t in range(first, last):
            row, base = x + at[begin + t] * hidden * 4, t * groups
            to_q, to_s = q.ctypes.data + base * 32, s.ctypes.data + base * 12
            quantize_normed_rows(row, hidden * 4, norm, eps, groups, to_q, to_s, 0, groups)
        wait(barrier, threads)
        out = logits + begin * vocabulary * 4
        linear(
            kind, weight, q.ctypes.data, s.ctypes.data, hidden, vocabulary, out, vocabulary * 4, n, 0, thread, threads
        )
        wait(barrier, threads)


@jit
def copy_features(x, features, width, offset, first, end):
    """Hidden states of a layer to their columns of features [N, width]."""
    hidden = x.shape[1]
    for t in range(first, end):
        for d in range(hidden):
            features[t * width + offset + d] = x[t, d]


@jit
def run_step(
    thread, threads, shape, eps, layers, head, x, rows, places, slots, positions, rotations, at, logits, features,
    buffers, barrier,
):  # fmt: skip
    """X [N, hidden] holds embeddings and is used up; logits: address of float32 [T, V].

    shape: hidden, heads, kv heads, head dim, inner width, vocabulary, int64. head: address of the final norm, kind,
    address of the weight. places: of every row's keys, one row after another. slots, positions [N]. features [N * F]
    float32, layers whose field FEATURES is a column (or -1). buffers: of the part of tokens, `work` this thread's own.
    """
    n, width = x.shape[0], len(features) // max(1, x.shape[0])
    wait(barrier, threads)
    for begin in range(0, n, _PART):
        end = min(n, begin + _PART)
        for i in range(len(layers)):
            layer = layers[i]
            run_layer(
                layer, shape, eps, x[begin:end], rows, places, slots, positions, rotations, begin, end, buffers,
                barrier, (thread, threads),
            )  # fmt: skip
            if layer[5] >= 0:
                first, last = share(end - begin, thread, threads)
                copy_features(x, features, width, layer[5], begin + first, begin + last)
                wait(barrier, threads)
    run_head(
        x.ctypes.data,
        at,
        head[0],
        head[1],
        head[2],
        shape,
        eps,
        logits,
        buffers[0],
        buffers[1],
        barrier,
        thread,
        threads,
    )
