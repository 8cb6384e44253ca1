"""The phases of the persistent kernel: device functions, each one program's share of one step of a layer.

Tokens are padded to 16. Buffers between phases are row-major: x [16, H] (the residual stream), q [16, A], partial
[S, 16, A] with lse [S, 16, heads], act [16, I], all in the model's dtype but lse (float32, base 2).
"""

from __future__ import annotations

import triton
import triton.language as tl

from benchmarks.persistent.attention import LOG2E, merge_splits
from benchmarks.persistent.ops import as_operand, load_operand, prefetch_rows, rows_of


@triton.jit
def weight_rows(
    tile: tl.tensor, TILES: tl.constexpr, A: tl.constexpr, N: tl.constexpr, PAIRED: tl.constexpr
) -> tl.tensor:
    """(row indices [A, 1, 1, 8, 1], mask) of a tile of a weight [N, K].

    PAIRED: the first half are rows of the gate, the second half the same rows of `up`, N / 2 further on.
    """
    rows = rows_of(0, A)
    if PAIRED:
        half = A * 4
        rows = tl.where(rows < half, tile * half + rows, N // 2 + tile * half + rows - half)
    else:
        rows = tile * A * 8 + rows
    return rows, (rows < N) & (tile < TILES)


@triton.jit
def load_weights(
    ptr: tl.tensor,
    tile: tl.tensor,
    k0: tl.tensor,
    TILES: tl.constexpr,
    A: tl.constexpr,
    N: tl.constexpr,
    K: tl.constexpr,
    KB: tl.constexpr,
    KS: tl.constexpr,
    PAIRED: tl.constexpr,
) -> tl.tensor:
    """A tile's weights as [A, KB, KS, 8, 32]; nothing is read beyond the last tile."""
    rows, ok = weight_rows(tile, TILES, A, N, PAIRED)
    return load_operand(ptr, rows * K, ok, k0, K, KB, KS, True, False)


@triton.jit
def prefetch_tile(
    ptr: tl.tensor,
    tile: tl.tensor,
    wanted: tl.tensor,
    TILES: tl.constexpr,
    A: tl.constexpr,
    N: tl.constexpr,
    K: tl.constexpr,
    PAIRED: tl.constexpr,
    LINE: tl.constexpr,
) -> None:
    """Asks for a tile's weights to be brought to the second-level cache; LINE elements fill a cache line."""
    rows = tl.arange(0, A * 8)
    if PAIRED:
        rows = tl.where(rows < A * 4, tile * A * 4 + rows, N // 2 + tile * A * 4 + rows - A * 4)
    else:
        rows = tile * A * 8 + rows
    prefetch_rows(ptr, rows * K, (rows < N) & (tile < TILES) & wanted, K, LINE)


@triton.jit
def read_input(
    x: tl.tensor,
    offsets: tl.tensor,
    ok: tl.tensor,
    norm: tl.tensor,
    lse: tl.tensor,
    used: tl.tensor,
    most: tl.tensor,
    k0: tl.tensor,
    K: tl.constexpr,
    KB: tl.constexpr,
    KS: tl.constexpr,
    D: tl.constexpr,
    MODE: tl.constexpr,
) -> tl.tensor:
    """(one block of a projection's input as an operand [KS, 16, 32 KB], float32 sums of its squares [KS, 16]).

    `offsets` are of the 16 rows of x [16, K]. MODE 1: times RMSNorm's weight `norm`; the root mean square is divided by
    behind the product. MODE 2: x are attention's partial results, merged here. MODE 0: x as it is.
    """
    squares = tl.zeros([KS, 16], tl.float32)
    if MODE == 2:
        if most > 1:
            block = merge_splits(x, lse, used, most, k0, K, D, KB, KS, 2)
        else:
            block = load_operand(x, offsets, ok, k0, K, KB, KS, True, True)
    else:
        block = load_operand(x, offsets, ok, k0, K, KB, KS, True, True)
    if MODE == 1:
        wide = as_operand(block, 2, KB, KS).to(tl.float32)
        squares += tl.sum(wide * wide, 2)
        block = block * load_operand(norm, rows_of(0, 1) * 0, rows_of(0, 1) >= 0, k0, K, KB, KS, True, False)
    return as_operand(block, 2, KB, KS), squares


@triton.jit
def multiply(
    rows: tl.tensor, weights: tl.tensor, A: tl.constexpr, KB: tl.constexpr, KS: tl.constexpr, PREC: tl.constexpr
) -> tl.tensor:
    """[KS, 16, 32 KB] times a block of weights [A, KB, KS, 8, 32] -> [KS, 16, 8 A] float32: a share of K a warp."""
    return tl.dot(rows, tl.permute(as_operand(weights, A, KB, KS), (0, 2, 1)), input_precision=PREC)


@triton.jit
def project(
    rows: tl.tensor,
    squares: tl.tensor,
    first: tl.tensor,
    x: tl.tensor,
    offsets: tl.tensor,
    ok: tl.tensor,
    norm: tl.tensor,
    lse: tl.tensor,
    used: tl.tensor,
    most: tl.tensor,
    ptr: tl.tensor,
    tile: tl.tensor,
    eps: tl.tensor,
    TILES: tl.constexpr,
    A: tl.constexpr,
    N: tl.constexpr,
    K: tl.constexpr,
    KB: tl.constexpr,
    KS: tl.constexpr,
    D: tl.constexpr,
    PAIRED: tl.constexpr,
    MODE: tl.constexpr,
    PREC: tl.constexpr,
) -> tl.tensor:
    """Input [16, K] times a weight tile -> float32 [16, 8 A].

    (`rows`, `squares`) is the input's first block and `first` the tile's, both read already; others are read here.
    """
    acc = multiply(rows, first, A, KB, KS, PREC)
    if K > KB * KS * 32:
        for k0 in range(KB * KS * 32, K, KB * KS * 32):
            weights = load_weights(ptr, tile, k0, TILES, A, N, K, KB, KS, PAIRED)
            more, more_squares = read_input(x, offsets, ok, norm, lse, used, most, k0, K, KB, KS, D, MODE)
            acc += multiply(more, weights, A, KB, KS, PREC)
            squares += more_squares
    total = tl.sum(acc, 0)
    if MODE == 1:
        total *= tl.rsqrt(tl.sum(squares, 0) / K + eps)[:, None]
    return total


@triton.jit
def rotation_of(
    tile: tl.tensor,
    positions: tl.tensor,
    rotations: tl.tensor,
    num_tokens: tl.tensor,
    A: tl.constexpr,
    HEADS: tl.constexpr,
    KV_HEADS: tl.constexpr,
    D: tl.constexpr,
) -> tl.tensor:
    """(cos, sin) [16, 4 A] of the pairs of a qkv tile; values are not rotated: (1, 0)."""
    token = tl.arange(0, 16)
    pairs = tile * (A * 4) + tl.arange(0, A * 4)
    rotates = (token < num_tokens)[:, None] & (pairs * 2 < (HEADS + KV_HEADS) * D)[None, :]
    position = tl.load(positions + token, mask=token < num_tokens, other=0).to(tl.int64)
    at = rotations + position[:, None] * D + (pairs % (D // 2) * 2)[None, :]
    return tl.load(at, mask=rotates, other=1.0), tl.load(at + 1, mask=rotates, other=0.0)


@triton.jit
def store_qkv(
    y: tl.tensor,
    tile: tl.tensor,
    q: tl.tensor,
    pool: tl.tensor,
    cos: tl.tensor,
    sin: tl.tensor,
    places: tl.tensor,
    num_tokens: tl.tensor,
    A: tl.constexpr,
    HEADS: tl.constexpr,
    KV_HEADS: tl.constexpr,
    D: tl.constexpr,
) -> None:
    """Rotates a tile y [16, 8 A]; queries go to `q`, keys and values to the pool's `places` [16]."""
    BN: tl.constexpr = A * 8
    token = tl.arange(0, 16)
    ok = token < num_tokens
    even, odd = tl.split(tl.reshape(y.to(q.dtype.element_ty).to(tl.float32), (16, BN // 2, 2)))
    turned = tl.reshape(tl.join(even * cos - odd * sin, even * sin + odd * cos), (16, BN)).to(q.dtype.element_ty)
    col = tile * BN + tl.arange(0, BN)
    is_q = col < HEADS * D
    tl.store(q + token[:, None] * (HEADS * D) + col[None, :], turned, mask=ok[:, None] & is_q[None, :])
    is_kv = (col >= HEADS * D) & (col < (HEADS + 2 * KV_HEADS) * D)
    tl.store(
        pool + places[:, None] * (2 * KV_HEADS * D) + (col - HEADS * D)[None, :],
        turned.to(pool.dtype.element_ty),
        mask=ok[:, None] & is_kv[None, :],
    )


@triton.jit
def read_tile(
    x: tl.tensor, offsets: tl.tensor, tile: tl.tensor, ok: tl.tensor, A: tl.constexpr, H: tl.constexpr
) -> tl.tensor:
    """Columns of a tile of the residual stream [16, 8 A], rows at `offsets` [16]: read early, added late."""
    col = tile * A * 8 + tl.arange(0, A * 8)
    mask = ok[:, None] & (col < H)[None, :]
    return tl.load(x + offsets[:, None] + col[None, :], mask=mask, other=0.0, cache_modifier=".cg")


@triton.jit
def store_sum(
    y: tl.tensor, before: tl.tensor, tile: tl.tensor, x: tl.tensor, ok: tl.tensor, A: tl.constexpr, H: tl.constexpr
) -> None:
    """Columns of a tile: x = before + y."""
    col = tile * A * 8 + tl.arange(0, A * 8)
    after = y.to(x.dtype.element_ty).to(tl.float32) + before.to(tl.float32)
    at = x + tl.arange(0, 16)[:, None] * H + col[None, :]
    tl.store(at, after.to(x.dtype.element_ty), mask=ok[:, None] & (col < H)[None, :])


@triton.jit
def store_gated(
    y: tl.tensor, tile: tl.tensor, act: tl.tensor, ok: tl.tensor, A: tl.constexpr, INTER: tl.constexpr
) -> None:
    """Columns of a tile y [16, gate 4 A | up 4 A]: act = silu(gate) * up."""
    y = y.to(act.dtype.element_ty).to(tl.float32)
    gate, up = tl.split(tl.permute(tl.reshape(y, (16, 2, A * 4)), (0, 2, 1)))
    gated = (gate / (1.0 + tl.exp2(-gate * LOG2E))).to(act.dtype.element_ty).to(tl.float32) * up
    col = tile * A * 4 + tl.arange(0, A * 4)
    at = act + tl.arange(0, 16)[:, None] * INTER + col[None, :]
    tl.store(at, gated.to(act.dtype.element_ty), mask=ok[:, None] & (col < INTER)[None, :])
