"""The persistent kernel: all layers of a small Llama, and its head, in one launch of one program a multiprocessor.

    A  RMSNorm, qkv projection, rotation, KV write          (layer 0 reads the embedding)
    B  attention of (row, kv head, 16 packed queries, split)
    C  merging of splits, output projection, residual
    D  RMSNorm, gate and up projection, SiLU * mul
    E  down projection, residual
    F  final RMSNorm and head, once

Behind each phase every program waits for every other. Between arriving and waiting it loads the first weights of its
next projection into registers (they depend on nothing), so that behind the barrier only activations are missing.
"""

# mypy: disable-error-code=possibly-undefined
# names are defined by the branches of constants that use them
from __future__ import annotations

import triton
import triton.language as tl

from benchmarks.persistent.attention import attend, open_item, prefetch_keys, used_splits
from benchmarks.persistent.ops import arrive, leave, rows_of, wait
from benchmarks.persistent.phases import (
    load_weights,
    prefetch_tile,
    project,
    read_input,
    read_tile,
    rotation_of,
    store_gated,
    store_qkv,
    store_sum,
)

ALL = -1
BARRIERS = 6
"""`PHASE`: ALL in one launch; 0 … 5 (A … F): one phase alone, without barriers; nothing but BARRIERS, to time them."""


@triton.jit(do_not_specialize=["num_tokens", "num_rows", "width", "num_splits", "layer_from", "layer_to", "patience"])
def llama_kernel(
    token_ids,
    positions,
    slot_mapping,
    slots,
    starts,
    tables,
    embedding,
    qkv_w,
    out_w,
    gate_up_w,
    down_w,
    head_w,
    input_norms,
    post_norms,
    final_norm,
    rotations,
    pools,
    x,
    q,
    partial,
    lse,
    act,
    logits,
    sync,
    pool_stride,
    table_stride,
    num_tokens,
    num_rows,
    width,
    num_splits,
    layer_from,
    layer_to,
    patience,
    eps,
    scale,
    H: tl.constexpr,
    HEADS: tl.constexpr,
    KV_HEADS: tl.constexpr,
    D: tl.constexpr,
    INTER: tl.constexpr,
    V: tl.constexpr,
    BLOCK: tl.constexpr,
    P: tl.constexpr,
    KS: tl.constexpr,
    KB_H: tl.constexpr,
    KB_A: tl.constexpr,
    KB_I: tl.constexpr,
    DB: tl.constexpr,
    A_QKV: tl.constexpr,
    A_OUT: tl.constexpr,
    A_GATE: tl.constexpr,
    A_DOWN: tl.constexpr,
    A_HEAD: tl.constexpr,
    TA: tl.constexpr,
    SPLIT: tl.constexpr,
    LINE: tl.constexpr,
    PREFETCH: tl.constexpr,
    PHASE: tl.constexpr,
    ERROR: tl.constexpr,
    PREC: tl.constexpr,
):
    """See the module and PersistentLlama. Integer scalars are counts; `scale` is that of attention scores."""
    AH: tl.constexpr = HEADS * D
    QKV: tl.constexpr = (HEADS + 2 * KV_HEADS) * D
    T_QKV: tl.constexpr = (QKV + A_QKV * 8 - 1) // (A_QKV * 8)
    T_OUT: tl.constexpr = (H + A_OUT * 8 - 1) // (A_OUT * 8)
    T_GATE: tl.constexpr = (INTER + A_GATE * 4 - 1) // (A_GATE * 4)
    T_DOWN: tl.constexpr = (H + A_DOWN * 8 - 1) // (A_DOWN * 8)
    T_HEAD: tl.constexpr = (V + A_HEAD * 8 - 1) // (A_HEAD * 8)
    ONE: tl.constexpr = PHASE == -1
    SYNC: tl.constexpr = ONE or PHASE == 6
    pid = tl.program_id(0)
    token5 = rows_of(0, 2)
    ok5 = token5 < num_tokens
    token = tl.arange(0, 16)
    ok = token < num_tokens
    used, most = used_splits(starts, width, num_tokens, num_splits, SPLIT)
    places = tl.load(slot_mapping + token, mask=ok, other=0).to(tl.int64)
    target = 0
    if ONE or PHASE == 0:
        cos, sin = rotation_of(pid, positions, rotations, num_tokens, A_QKV, HEADS, KV_HEADS, D)
        w_qkv = load_weights(qkv_w + layer_from.to(tl.int64) * QKV * H, pid, 0, T_QKV, A_QKV, QKV, H, KB_H, KS, False)
    for layer in range(layer_from, layer_to):
        at = layer_from.to(tl.int64) * 0 + layer  # the interpreter counts in Python integers
        pool = pools + at * pool_stride
        source, rows5, rows = x, token5.to(tl.int64) * H, token.to(tl.int64) * H
        if layer == 0:
            source = embedding
            rows5 = tl.load(token_ids + token5, mask=ok5, other=0).to(tl.int64) * H
            rows = tl.load(token_ids + token, mask=ok, other=0).to(tl.int64) * H
        if (ONE or PHASE == 0) and pid < T_QKV:
            norm, w = input_norms + at * H, qkv_w + at * QKV * H
            read, squares = read_input(source, rows5, ok5, norm, lse, used, most, 0, H, KB_H, KS, D, 1)
            for tile in range(pid, T_QKV, P):
                if T_QKV > P:
                    ahead = load_weights(w, tile + P, 0, T_QKV, A_QKV, QKV, H, KB_H, KS, False)
                y = project(
                    read, squares, w_qkv, source, rows5, ok5, norm, lse, used, most, w, tile, eps,
                    T_QKV, A_QKV, QKV, H, KB_H, KS, D, False, 1, PREC,
                )  # fmt: skip
                if T_QKV > P:
                    cos, sin = rotation_of(tile, positions, rotations, num_tokens, A_QKV, HEADS, KV_HEADS, D)
                store_qkv(y, tile, q, pool, cos, sin, places, num_tokens, A_QKV, HEADS, KV_HEADS, D)
                if T_QKV > P:
                    w_qkv = ahead
        if SYNC:
            arrive(sync)
        if ONE or PHASE == 2:
            w_out = load_weights(out_w + at * H * AH, pid, 0, T_OUT, A_OUT, H, AH, KB_A, KS, False)
        if ONE or PHASE == 1:
            start, table, begin, end, key_ids, value_ids = open_item(
                pid, tables, table_stride, slots, starts, num_rows, width, num_splits,
                HEADS, KV_HEADS, KS, TA, SPLIT, BLOCK,
            )  # fmt: skip
        if SYNC:
            if PREFETCH and ONE:
                prefetch_keys(
                    pid, value_ids, begin, end, pool, width, num_splits, HEADS, KV_HEADS, D, KS, TA * 8, BLOCK, LINE
                )
                prefetch_tile(out_w + (at + 1) * H * AH, pid, layer + 1 < layer_to, T_OUT, A_OUT, H, AH, False, LINE)
            target += P
            patience = wait(sync, target, patience)
        if ONE or PHASE == 1:
            packs = (width * (HEADS // KV_HEADS) + 15) // 16
            for item in range(pid, num_rows * KV_HEADS * packs * num_splits, P):
                attend(
                    item, start, table, begin, end, key_ids, value_ids,
                    q, pool, tables, partial, lse, width, num_splits, scale,
                    HEADS, KV_HEADS, D, DB, KS, TA, BLOCK, PREC,
                )  # fmt: skip
                start, table, begin, end, key_ids, value_ids = open_item(
                    item + P, tables, table_stride, slots, starts, num_rows, width, num_splits,
                    HEADS, KV_HEADS, KS, TA, SPLIT, BLOCK,
                )  # fmt: skip
        if SYNC:
            arrive(sync)
            if PREFETCH and ONE:
                next_gate = gate_up_w + (at + 1) * 2 * INTER * H
                prefetch_tile(next_gate, pid, layer + 1 < layer_to, T_GATE, A_GATE, 2 * INTER, H, True, LINE)
            target += P
            patience = wait(sync, target, patience)
        if (ONE or PHASE == 2) and pid < T_OUT:
            w = out_w + at * H * AH
            read, squares = read_input(partial, token5 * AH, ok5, x, lse, used, most, 0, AH, KB_A, KS, D, 2)
            for tile in range(pid, T_OUT, P):
                if T_OUT > P:
                    ahead = load_weights(w, tile + P, 0, T_OUT, A_OUT, H, AH, KB_A, KS, False)
                before = read_tile(source, rows, tile, ok, A_OUT, H)
                y = project(
                    read, squares, w_out, partial, token5 * AH, ok5, x, lse, used, most, w, tile, eps,
                    T_OUT, A_OUT, H, AH, KB_A, KS, D, False, 2, PREC,
                )  # fmt: skip
                store_sum(y, before, tile, x, ok, A_OUT, H)
                if T_OUT > P:
                    w_out = ahead
        if SYNC:
            arrive(sync)
        if ONE or PHASE == 3:
            w = gate_up_w + at * 2 * INTER * H
            w_gate = load_weights(w, pid, 0, T_GATE, A_GATE, 2 * INTER, H, KB_H, KS, True)
        if SYNC:
            if PREFETCH and ONE:
                prefetch_tile(
                    down_w + (at + 1) * H * INTER, pid, layer + 1 < layer_to, T_DOWN, A_DOWN, H, INTER, False, LINE
                )
            target += P
            patience = wait(sync, target, patience)
        if (ONE or PHASE == 3) and pid < T_GATE:
            norm, w = post_norms + at * H, gate_up_w + at * 2 * INTER * H
            read, squares = read_input(x, token5 * H, ok5, norm, lse, used, most, 0, H, KB_H, KS, D, 1)
            for tile in range(pid, T_GATE, P):
                if T_GATE > P:
                    ahead = load_weights(w, tile + P, 0, T_GATE, A_GATE, 2 * INTER, H, KB_H, KS, True)
                y = project(
                    read, squares, w_gate, x, token5 * H, ok5, norm, lse, used, most, w, tile, eps,
                    T_GATE, A_GATE, 2 * INTER, H, KB_H, KS, D, True, 1, PREC,
                )  # fmt: skip
                store_gated(y, tile, act, ok, A_GATE, INTER)
                if T_GATE > P:
                    w_gate = ahead
        if SYNC:
            arrive(sync)
        if ONE or PHASE == 4:
            w_down = load_weights(down_w + at * H * INTER, pid, 0, T_DOWN, A_DOWN, H, INTER, KB_I, KS, False)
        if SYNC:
            if PREFETCH and ONE:
                prefetch_tile(qkv_w + (at + 2) * QKV * H, pid, layer + 2 < layer_to, T_QKV, A_QKV, QKV, H, False, LINE)
            target += P
            patience = wait(sync, target, patience)
        if (ONE or PHASE == 4) and pid < T_DOWN:
            w = down_w + at * H * INTER
            read, squares = read_input(act, token5 * INTER, ok5, x, lse, used, most, 0, INTER, KB_I, KS, D, 0)
            for tile in range(pid, T_DOWN, P):
                if T_DOWN > P:
                    ahead = load_weights(w, tile + P, 0, T_DOWN, A_DOWN, H, INTER, KB_I, KS, False)
                before = read_tile(x, token * H, tile, ok, A_DOWN, H)
                y = project(
                    read, squares, w_down, act, token5 * INTER, ok5, x, lse, used, most, w, tile, eps,
                    T_DOWN, A_DOWN, H, INTER, KB_I, KS, D, False, 0, PREC,
                )  # fmt: skip
                store_sum(y, before, tile, x, ok, A_DOWN, H)
                if T_DOWN > P:
                    w_down = ahead
        if SYNC:
            arrive(sync)
        if ONE:
            following = pid
            if layer + 1 == layer_to:
                following = T_QKV
            w_qkv = load_weights(qkv_w + (at + 1) * QKV * H, following, 0, T_QKV, A_QKV, QKV, H, KB_H, KS, False)
        if SYNC:
            target += P
            patience = wait(sync, target, patience)
    if ONE or PHASE == 5:
        w_head = load_weights(head_w, pid, 0, T_HEAD, A_HEAD, V, H, KB_H, KS, False)
        read, squares = read_input(x, token5 * H, ok5, final_norm, lse, used, most, 0, H, KB_H, KS, D, 1)
        for tile in range(pid, T_HEAD, P):
            ahead = load_weights(head_w, tile + P, 0, T_HEAD, A_HEAD, V, H, KB_H, KS, False)
            y = project(
                read, squares, w_head, x, token5 * H, ok5, final_norm, lse, used, most, head_w, tile, eps,
                T_HEAD, A_HEAD, V, H, KB_H, KS, D, False, 1, PREC,
            )  # fmt: skip
            col = tile * A_HEAD * 8 + tl.arange(0, A_HEAD * 8)
            where = token.to(tl.int64)[:, None] * V + col[None, :]
            tl.store(logits + where, y.to(x.dtype.element_ty).to(tl.float32), mask=ok[:, None] & (col < V)[None, :])
            w_head = ahead
    if SYNC:
        leave(sync, patience, P, ERROR)
