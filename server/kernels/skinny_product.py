"""What the skinny linear kernels share: a few rows of x times a tile of rows of W.

A step of M <= 64 tokens reads every weight once and computes little: the product must stream W [N, K] at the memory's
speed. One program owns BLOCK_N rows of W and all rows of x. Nothing is reduced between programs, so there are no
counters to zero and a result depends on the tile alone.

* SPLIT > 1 cuts each BLOCK_K among SPLIT parts of one batched dot, which Triton gives to different warps: they share
  the reduction over K instead of the few columns, and the chain of dependent tensor-core instructions, which is what a
  small layer waits for, is SPLIT times shorter.
* x goes into the dot as it is in memory: arithmetic on it would take it through registers in every program
  (skinny_scaled.py has the norm).
* With programmatic dependent launch a program starts while the kernel before it still runs. Where BLOCK_K + TAIL covers
  K the whole weight tile is loaded into registers before waiting (in two pieces, as K is seldom a power of two), else
  the first PREFETCH elements of each row are asked into the L2 cache. What other kernels wrote is read after the wait,
  and everything is written after it.
"""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def w_rows(i: tl.tensor, first: tl.tensor, N: tl.constexpr, PAIR: tl.constexpr) -> tl.tensor:
    """Rows of W that hold a program's columns i, int64. Columns beyond N repeat the last: their results are not stored.

    With PAIR, W is [2 N, K] and columns 2i and 2i + 1 are rows first + i and N + first + i.
    """
    rows = tl.minimum(first + i // 2, N - 1) + (i % 2) * N if PAIR else tl.minimum(first + i, N - 1)
    return rows.to(tl.int64)


@triton.jit
def prefetch_rows(
    w_ptr: tl.tensor,
    first: tl.tensor,
    N: tl.constexpr,
    K: tl.constexpr,
    ROWS: tl.constexpr,
    PAIR: tl.constexpr,
    PREFETCH: tl.constexpr,
    THREADS: tl.constexpr,
) -> None:
    """Asks the first PREFETCH elements of a program's rows of W into L2.

    One instruction a row. A warp issues those of its threads one by one, so rows are dealt out to all warps.
    """
    apart: tl.constexpr = THREADS // ROWS if THREADS > ROWS else 1
    i = tl.arange(0, ROWS * apart)
    address = (w_ptr + w_rows(i // apart, first, N, PAIR) * K).to(tl.int64)
    size = tl.full([ROWS * apart], PREFETCH * w_ptr.dtype.element_ty.primitive_bitwidth // 8, tl.int32)
    tl.inline_asm_elementwise(
        "{ .reg .pred p; setp.eq.b32 p, $3, 0; @p cp.async.bulk.prefetch.L2.global [$1], $2; mov.b32 $0, 0; }",
        "=r,l,r,r",
        [address, size, i % apart],
        dtype=tl.int32,
        is_pure=False,
        pack=1,
    )


@triton.jit
def x_tile(row: tl.tensor, K: tl.constexpr, SPLIT: tl.constexpr, PART: tl.constexpr) -> tl.tensor:
    """(k, offsets) of a tile of x, [BLOCK_M, PART] or [SPLIT, BLOCK_M, PART], for rows `row` [BLOCK_M] int64."""
    k = tl.arange(0, PART)
    if SPLIT == 1:
        at_k = k[None, :]
        offsets = row[:, None] * K + at_k
    else:
        at_k = (tl.arange(0, SPLIT) * PART)[:, None, None] + k[None, None, :]
        offsets = row[None, :, None] * K + at_k
    return at_k, offsets


@triton.jit
def w_tile(row: tl.tensor, K: tl.constexpr, SPLIT: tl.constexpr, PART: tl.constexpr) -> tl.tensor:
    """(k, offsets) of a transposed tile of W, [PART, BLOCK_N] or [SPLIT, PART, BLOCK_N], for rows `row` [BLOCK_N]."""
    k = tl.arange(0, PART)
    if SPLIT == 1:
        at_k = k[:, None]
        offsets = row[None, :] * K + at_k
    else:
        at_k = (tl.arange(0, SPLIT) * PART)[:, None, None] + k[None, :, None]
        offsets = row[None, None, :] * K + at_k
    return at_k, offsets


@triton.jit
def load_w(
    w_ptr: tl.tensor, row: tl.tensor, K: tl.constexpr, START: tl.constexpr, BLOCK_K: tl.constexpr, SPLIT: tl.constexpr
) -> tl.tensor:
    """The tile of W from k = START on, evicted first: nobody reads it again in this step."""
    at_k, offsets = w_tile(row, K, SPLIT, BLOCK_K // SPLIT)
    if START + BLOCK_K <= K:
        tile = tl.load(w_ptr + START + offsets, eviction_policy="evict_first")
    else:
        tile = tl.load(w_ptr + START + offsets, mask=START + at_k < K, other=0.0, eviction_policy="evict_first")
    return tile


@triton.jit
def load_x(
    x_ptr: tl.tensor,
    row: tl.tensor,
    present: tl.tensor,
    K: tl.constexpr,
    START: tl.constexpr,
    BLOCK_K: tl.constexpr,
    SPLIT: tl.constexpr,
) -> tl.tensor:
    """The tile of x from k = START on; rows that are not there and k beyond K read as 0."""
    at_k, offsets = x_tile(row, K, SPLIT, BLOCK_K // SPLIT)
    valid = present[:, None] if SPLIT == 1 else present[None, :, None]
    if START + BLOCK_K > K:
        valid = valid & (START + at_k < K)
    return tl.load(x_ptr + START + offsets, mask=valid, other=0.0)


@triton.jit
def ahead(
    w_ptr: tl.tensor,
    first: tl.tensor,
    N: tl.constexpr,
    K: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK_K: tl.constexpr,
    TAIL: tl.constexpr,
    SPLIT: tl.constexpr,
    PAIR: tl.constexpr,
    PREFETCH: tl.constexpr,
    THREADS: tl.constexpr,
    PDL: tl.constexpr,
) -> tl.tensor:
    """What needs no other kernel: W's tile in two pieces where they cover K (TAIL 0: one), else twice `w_ptr`.

    ROWS of W are a program's: those of w_rows from `first` on. The caller waits for the kernel before this one
    (`gdc_wait`) afterwards.
    """
    if PDL:
        tl.extra.cuda.gdc_launch_dependents()
    w, tail = w_ptr, w_ptr
    if BLOCK_K + TAIL >= K:
        row = w_rows(tl.arange(0, ROWS), first, N, PAIR)
        w = load_w(w_ptr, row, K, 0, BLOCK_K, SPLIT)
        tail = load_w(w_ptr, row, K, BLOCK_K, TAIL, SPLIT) if TAIL > 0 else w
    elif PDL and PREFETCH > 0:
        prefetch_rows(w_ptr, first, N, K, ROWS, PAIR, PREFETCH, THREADS)
    return w, tail


@triton.jit
def product(
    x_ptr: tl.tensor,
    row: tl.tensor,
    present: tl.tensor,
    w: tl.tensor,
    tail: tl.tensor,
    first: tl.tensor,
    N: tl.constexpr,
    K: tl.constexpr,
    BLOCK_M: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK_K: tl.constexpr,
    TAIL: tl.constexpr,
    SPLIT: tl.constexpr,
    PAIR: tl.constexpr,
    PRECISION: tl.constexpr,
) -> tl.tensor:
    """Product x Wᵀ, float32 [BLOCK_M, ROWS], of lines `row` [BLOCK_M] int64 of x; 0 where they are not `present`.

    `w` and `tail` are what `ahead` returned for the same constants.
    """
    acc = tl.zeros([BLOCK_M, ROWS] if SPLIT == 1 else [SPLIT, BLOCK_M, ROWS], tl.float32)
    if BLOCK_K + TAIL >= K:
        if TAIL > 0:  # its few loads first: they are then in flight with the others'
            x_tail = load_x(x_ptr, row, present, K, BLOCK_K, TAIL, SPLIT)
            x = load_x(x_ptr, row, present, K, 0, BLOCK_K, SPLIT)
            acc = tl.dot(x, w, acc, input_precision=PRECISION)
            acc = tl.dot(x_tail, tail, acc, input_precision=PRECISION)
        else:
            x = load_x(x_ptr, row, present, K, 0, BLOCK_K, SPLIT)
            acc = tl.dot(x, w, acc, input_precision=PRECISION)
    else:
        PART: tl.constexpr = BLOCK_K // SPLIT
        k_x, x_offsets = x_tile(row, K, SPLIT, PART)
        k_w, w_offsets = w_tile(w_rows(tl.arange(0, ROWS), first, N, PAIR), K, SPLIT, PART)
        valid = present[:, None] if SPLIT == 1 else present[None, :, None]
        for k0 in range(0, K, BLOCK_K):
            if K % BLOCK_K == 0:
                x = tl.load(x_ptr + k0 + x_offsets, mask=valid, other=0.0)
                w_now = tl.load(w + k0 + w_offsets, eviction_policy="evict_first")
            else:
                x = tl.load(x_ptr + k0 + x_offsets, mask=valid & (k0 + k_x < K), other=0.0)
                w_now = tl.load(w + k0 + w_offsets, mask=k0 + k_w < K, other=0.0, eviction_policy="evict_first")
            acc = tl.dot(x, w_now, acc, input_precision=PRECISION)
    if SPLIT > 1:
        acc = tl.sum(acc, axis=0)
    return acc
