"""What the skinny linear kernels share: a few rows of x (normalised if asked) times a tile of rows of W.

A step of M <= 64 tokens reads every weight once and computes little: the product must stream W [N, K] at the memory's
speed. One program owns BLOCK_N rows of W and all rows of x. Nothing is reduced between programs, so there are no
counters to zero and a result depends on the tile alone.

* SPLIT > 1 cuts each BLOCK_K among SPLIT parts of one batched dot, which Triton gives to different warps: they share
  the reduction over K instead of the few columns, and the chain of dependent tensor-core instructions, which is what a
  small layer waits for, is SPLIT times shorter.
* RMSNorm (Zhang and Sennrich 2019) needs no pass of its own: x * norm goes into the dot, the squares of x are summed
  beside it, and the accumulator is multiplied by 1 / rms at the end.
* With programmatic dependent launch a program starts while the kernel before it still runs. Where BLOCK_K covers K the
  whole weight tile is loaded into registers before waiting, else the first PREFETCH elements of each row are asked into
  the L2 cache. What other kernels wrote is read after the wait, and everything is written after it.
"""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def prefetch_rows(
    w_ptr: tl.tensor,
    first: tl.tensor,
    last: tl.tensor,
    K: tl.constexpr,
    BLOCK_N: tl.constexpr,
    PREFETCH: tl.constexpr,
    THREADS: tl.constexpr,
) -> None:
    """Asks the first PREFETCH elements of rows first .. first + BLOCK_N into L2.

    One instruction a row. A warp issues those of its threads one by one, so rows are dealt out to all warps.
    """
    apart: tl.constexpr = THREADS // BLOCK_N if THREADS > BLOCK_N else 1
    i = tl.arange(0, BLOCK_N * apart)
    row = tl.minimum(first + i // apart, last)
    address = (w_ptr + row.to(tl.int64) * K).to(tl.int64)
    size = tl.full([BLOCK_N * apart], PREFETCH * w_ptr.dtype.element_ty.primitive_bitwidth // 8, tl.int32)
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
def w_tile(n: tl.tensor, K: tl.constexpr, SPLIT: tl.constexpr, PART: tl.constexpr) -> tl.tensor:
    """(k, offsets) of a transposed tile of W, [PART, BLOCK_N] or [SPLIT, PART, BLOCK_N], for rows `n` [BLOCK_N]."""
    k = tl.arange(0, PART)
    if SPLIT == 1:
        at_k = k[:, None]
        offsets = n[None, :].to(tl.int64) * K + at_k
    else:
        at_k = (tl.arange(0, SPLIT) * PART)[:, None, None] + k[None, :, None]
        offsets = n[None, None, :].to(tl.int64) * K + at_k
    return at_k, offsets


@triton.jit
def load_w(pointers: tl.tensor, at_k: tl.tensor, K: tl.constexpr, BLOCK_K: tl.constexpr) -> tl.tensor:
    """A tile of W, evicted first: nobody reads it again in this step."""
    if K % BLOCK_K == 0:
        tile = tl.load(pointers, eviction_policy="evict_first")
    else:
        tile = tl.load(pointers, mask=at_k < K, other=0.0, eviction_policy="evict_first")
    return tile


@triton.jit
def load_x(pointers: tl.tensor, valid: tl.tensor, at_k: tl.tensor, K: tl.constexpr, BLOCK_K: tl.constexpr) -> tl.tensor:
    """A tile of x; rows that are not there and k beyond K read as 0."""
    if K % BLOCK_K == 0:
        tile = tl.load(pointers, mask=valid, other=0.0)
    else:
        tile = tl.load(pointers, mask=valid & (at_k < K), other=0.0)
    return tile


@triton.jit
def load_norm(norm_ptr: tl.tensor, at_k: tl.tensor, K: tl.constexpr, PRESCALE: tl.constexpr) -> tl.tensor:
    """The norm's weights for a tile of x, float32, times PRESCALE (which keeps float16 products from overflowing)."""
    norm = tl.load(norm_ptr + at_k, mask=at_k < K, other=0.0)
    return norm.to(tl.float32) * PRESCALE


@triton.jit
def summed(acc: tl.tensor, SPLIT: tl.constexpr) -> tl.tensor:
    """The parts of an accumulator added up."""
    if SPLIT > 1:
        acc = tl.sum(acc, axis=0)
    return acc


@triton.jit
def inverse_rms(
    squares: tl.tensor, eps: tl.tensor, K: tl.constexpr, SPLIT: tl.constexpr, PRESCALE: tl.constexpr
) -> tl.tensor:
    """1 / (PRESCALE * rms) of each row, [BLOCK_M, 1], from elementwise squares shaped like a tile of x."""
    if SPLIT > 1:
        squares = tl.sum(squares, axis=0)
    mean = tl.sum(squares, axis=1) / K
    return (tl.rsqrt(mean + eps) / PRESCALE)[:, None]


@triton.jit
def ahead(
    w_ptr: tl.tensor,
    norm_ptr: tl.tensor,
    first: tl.tensor,
    N: tl.constexpr,
    K: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    SPLIT: tl.constexpr,
    PAIR: tl.constexpr,
    NORM: tl.constexpr,
    PRESCALE: tl.constexpr,
    PREFETCH: tl.constexpr,
    THREADS: tl.constexpr,
    PDL: tl.constexpr,
) -> tl.tensor:
    """What needs no other kernel: (W, paired W, norm weights) as tiles where BLOCK_K covers K, else pointers to them.

    The caller waits for the kernel before this one (`gdc_wait`) afterwards. With PAIR, W is [2 N, K] and row N + n goes
    with row n. Rows beyond N repeat row N - 1: the caller masks their results when it stores.
    """
    if PDL:
        tl.extra.cuda.gdc_launch_dependents()
    PART: tl.constexpr = BLOCK_K // SPLIT
    n = tl.minimum(first + tl.arange(0, BLOCK_N), N - 1)
    k_w, offsets = w_tile(n, K, SPLIT, PART)
    w = w_ptr + offsets
    pair = w + N * K if PAIR else w
    norm = norm_ptr
    if BLOCK_K >= K:
        w = load_w(w, k_w, K, BLOCK_K)
        pair = load_w(pair, k_w, K, BLOCK_K) if PAIR else w
        if NORM:
            k_x, _ = x_tile(tl.zeros([1], tl.int64), K, SPLIT, PART)
            norm = load_norm(norm_ptr, k_x, K, PRESCALE)
    elif PDL and PREFETCH > 0:
        prefetch_rows(w_ptr, first, N - 1, K, BLOCK_N, PREFETCH, THREADS)
        if PAIR:
            prefetch_rows(w_ptr, N + first, 2 * N - 1, K, BLOCK_N, PREFETCH, THREADS)
    return w, pair, norm


@triton.jit
def product(
    x_ptr: tl.tensor,
    row: tl.tensor,
    present: tl.tensor,
    w: tl.tensor,
    pair: tl.tensor,
    norm: tl.tensor,
    eps: tl.tensor,
    K: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    SPLIT: tl.constexpr,
    PAIR: tl.constexpr,
    NORM: tl.constexpr,
    PRESCALE: tl.constexpr,
    PRECISION: tl.constexpr,
) -> tl.tensor:
    """(a, b) float32 [BLOCK_M, BLOCK_N]: rows of x times W and, with PAIR, times its paired rows (else b is a).

    `w`, `pair` and `norm` are what `ahead` returned; `row` [BLOCK_M] int64 are lines of x [., K] and `present` which
    of them exist: the others come out 0.
    """
    PART: tl.constexpr = BLOCK_K // SPLIT
    k_x, offsets = x_tile(row, K, SPLIT, PART)
    valid = present[:, None] if SPLIT == 1 else present[None, :, None]
    pointers = x_ptr + offsets
    if SPLIT == 1:
        a = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
        squares = tl.zeros([BLOCK_M, PART], tl.float32)
    else:
        a = tl.zeros([SPLIT, BLOCK_M, BLOCK_N], tl.float32)
        squares = tl.zeros([SPLIT, BLOCK_M, PART], tl.float32)
    b = a
    if BLOCK_K >= K:
        x = load_x(pointers, valid, k_x, K, BLOCK_K)
        if NORM:
            wide = x.to(tl.float32)
            squares = wide * wide
            x = (wide * norm).to(x.dtype)
        a = tl.dot(x, w, a, input_precision=PRECISION)
        if PAIR:
            b = tl.dot(x, pair, b, input_precision=PRECISION)
    else:
        k_w, _ = w_tile(tl.zeros([1], tl.int32), K, SPLIT, PART)
        for k0 in range(0, K, BLOCK_K):
            x = load_x(pointers + k0, valid, k_x + k0, K, BLOCK_K)
            w_now = load_w(w + k0, k_w + k0, K, BLOCK_K)
            if NORM:
                wide = x.to(tl.float32)
                squares += wide * wide
                x = (wide * load_norm(norm, k_x + k0, K, PRESCALE)).to(x.dtype)
            a = tl.dot(x, w_now, a, input_precision=PRECISION)
            if PAIR:
                b = tl.dot(x, load_w(pair + k0, k_w + k0, K, BLOCK_K), b, input_precision=PRECISION)
    a = summed(a, SPLIT)
    b = summed(b, SPLIT) if PAIR else a
    if NORM:
        scale = inverse_rms(squares, eps, K, SPLIT, PRESCALE)
        a = a * scale
        b = b * scale if PAIR else a
    return a, b
