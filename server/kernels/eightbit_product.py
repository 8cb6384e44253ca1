"""What the skinny kernels of low-precision weights share: up to 64 rows of x times a tile of rows of W.

Weights are a step's traffic, as in skinny_product.py; here they are half or a quarter of it, so that the rest counts
twice. x comes as its format says: 8 bits a token (the same type as W, multiplied by the 8-bit tensor cores; scales are
applied to the sums), or in the model's dtype, to which W is then converted in registers.

* SWAP computes the product transposed, W xᵀ: rows of W are then what wgmma takes 64 of, both operands come straight
  from shared memory, and x is padded to 16 columns only. Without it mma.sync is used: 16 rows of W are a tile already,
  and SPLIT cuts K among warps (skinny_product.py); Hopper has no mma.sync for float8 and converts to float16.
* PARTS programs share the K of a tile, each with SHARE of it. Their float32 sums are added by whoever reads them next,
  which for the residual stream is the norm that follows anyway (quantize.py): in a fixed order, without counters.
* GROUP > 0: W is 4-bit, [N, STRIDE] bytes (`pack_groups`). A byte holds a column of one group of K and the same column
  of the next, so a tile of bytes is two tiles of W, each with a scale a row, which are multiplied into the sums.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from server.kernels.skinny_product import load_x, w_rows, w_tile, x_tile

_FLOAT8_ASM = """{ .reg .b32 u, neg, one, ones, v;
shr.b32 u, $1, SHIFT;
and.b32 u, u, 0x0F0F0F0F;
not.b32 neg, u;
and.b32 neg, neg, 0x08080808;
shr.b32 one, neg, 3;
shl.b32 ones, neg, 1;
sub.u32 ones, ones, one;
xor.b32 v, u, ones;
add.u32 v, v, one;
sub.u32 v, v, 0x08080808;
shl.b32 neg, neg, 4;
or.b32 $0, v, neg; }"""
_FLOAT8_LOW = tl.constexpr(_FLOAT8_ASM.replace("SHIFT", "0"))
_FLOAT8_HIGH = tl.constexpr(_FLOAT8_ASM.replace("SHIFT", "4"))


@triton.jit
def _dot(a: tl.tensor, b: tl.tensor, acc: tl.tensor, PRECISION: tl.constexpr) -> tl.tensor:
    """Sum acc + a b: int32 for integers; float8 sums leave the tensor core's short accumulator every 128 of K."""
    if a.dtype == tl.int8:
        acc = tl.dot(a, b, acc, out_dtype=tl.int32)
    elif a.dtype == tl.float8e4nv:
        EXACT: tl.constexpr = 128 if a.shape[-1] >= 128 else a.shape[-1]
        acc = tl.dot(a, b, acc, max_num_imprecise_acc=EXACT)
    else:
        acc = tl.dot(a, b, acc, input_precision=PRECISION)
    return acc


@triton.jit
def _multiplied(x: tl.tensor, w: tl.tensor, acc: tl.tensor, SWAP: tl.constexpr, PRECISION: tl.constexpr) -> tl.tensor:
    """Sum acc + x w, or with SWAP acc + w xᵀ, in x's dtype."""
    w = w.to(x.dtype)
    return _dot(w, tl.trans(x), acc, PRECISION) if SWAP else _dot(x, w, acc, PRECISION)


@triton.jit
def _nibbles(w: tl.tensor, FLOAT8: tl.constexpr, PACKED: tl.constexpr) -> tl.tensor:
    """Two tiles of numbers from one of bytes: 16 times the numbers as int8, or with FLOAT8 1 / 512 of them.

    PACKED works on four bytes at once: not under the interpreter.
    """
    if PACKED and FLOAT8:
        low, high = _float8_nibbles(w, 0), _float8_nibbles(w, 4)
    elif FLOAT8:
        low = (((w & 15) - 8).to(tl.float32) / 512).to(tl.float8e4nv)
        high = ((((w >> 4) & 15) - 8).to(tl.float32) / 512).to(tl.float8e4nv)
    elif PACKED:
        low = tl.inline_asm_elementwise(
            "{ .reg .b32 t; shl.b32 t, $1, 4; and.b32 $0, t, 0xF0F0F0F0; }",
            "=r,r", [w], dtype=tl.int8, is_pure=True, pack=4,
        )  # fmt: skip
        high = tl.inline_asm_elementwise(
            "and.b32 $0, $1, 0xF0F0F0F0;", "=r,r", [w], dtype=tl.int8, is_pure=True, pack=4
        )
    else:
        low, high = w << 4, w & -16
    return low, high


@triton.jit
def _float8_nibbles(w: tl.tensor, SHIFT: tl.constexpr) -> tl.tensor:
    """Nibbles u = 0 … 15 as float8 numbers (u - 8) / 512, four at once.

    The byte m = 0 … 8 is the float8 number m / 512 exactly (subnormal up to 7, then the smallest normal), so only a
    sign is needed beside the magnitude; 512 goes into the scales.
    """
    ASM: tl.constexpr = _FLOAT8_HIGH if SHIFT else _FLOAT8_LOW
    shifted = tl.inline_asm_elementwise(ASM, "=r,r", [w], dtype=tl.int8, is_pure=True, pack=4)
    return shifted.to(tl.float8e4nv, bitcast=True)


@triton.jit
def product(
    x_ptr: tl.tensor,
    present: tl.tensor,
    w: tl.tensor,
    tail: tl.tensor,
    first: tl.tensor,
    begin: tl.tensor,
    N: tl.constexpr,
    K: tl.constexpr,
    BLOCK_M: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK_K: tl.constexpr,
    TAIL: tl.constexpr,
    SHARE: tl.constexpr,
    SPLIT: tl.constexpr,
    PAIR: tl.constexpr,
    SWAP: tl.constexpr,
    PRECISION: tl.constexpr,
) -> tl.tensor:
    """Sums [BLOCK_M, ROWS] float32 of x [., K] times rows of W, from k = `begin` on, SHARE of them; 0 for absent rows.

    `w` and `tail` are what skinny_product.ahead returned for the same constants.
    """
    dtype = tl.int32 if x_ptr.dtype.element_ty == tl.int8 else tl.float32
    row = tl.arange(0, BLOCK_M).to(tl.int64)
    if SWAP:
        acc = tl.zeros([ROWS, BLOCK_M], dtype)
    else:
        acc = tl.zeros([BLOCK_M, ROWS] if SPLIT == 1 else [SPLIT, BLOCK_M, ROWS], dtype)
    if BLOCK_K + TAIL >= K:
        if TAIL > 0:
            x_tail = load_x(x_ptr, row, present, K, BLOCK_K, TAIL, SPLIT)
            acc = _multiplied(load_x(x_ptr, row, present, K, 0, BLOCK_K, SPLIT), w, acc, False, PRECISION)
            acc = _multiplied(x_tail, tail, acc, False, PRECISION)
        else:
            acc = _multiplied(load_x(x_ptr, row, present, K, 0, BLOCK_K, SPLIT), w, acc, False, PRECISION)
    else:
        PART: tl.constexpr = BLOCK_K // SPLIT
        k_x, x_offsets = x_tile(row, K, SPLIT, PART)
        valid = present[:, None] if SPLIT == 1 else present[None, :, None]
        lines = w_rows(tl.arange(0, ROWS), first, N, PAIR)
        if SWAP:
            k_w = tl.arange(0, BLOCK_K)[None, :]
            w_offsets = lines[:, None] * K + k_w
        else:
            k_w, w_offsets = w_tile(lines, K, SPLIT, PART)
        for k0 in range(begin, tl.minimum(begin + SHARE, K), BLOCK_K):
            if K % BLOCK_K == 0:
                x = tl.load(x_ptr + k0 + x_offsets, mask=valid, other=0.0)
                w_now = tl.load(w + (k0 - begin) + w_offsets, eviction_policy="evict_first")
            else:
                x = tl.load(x_ptr + k0 + x_offsets, mask=valid & (k0 + k_x < K), other=0.0)
                inside = k0 + k_w < K
                w_now = tl.load(w + (k0 - begin) + w_offsets, mask=inside, other=0.0, eviction_policy="evict_first")
            acc = _multiplied(x, w_now, acc, SWAP, PRECISION)
    if SPLIT > 1:
        acc = tl.sum(acc, axis=0)
    return (tl.trans(acc) if SWAP else acc).to(tl.float32)


@triton.jit
def grouped_product(
    x_ptr: tl.tensor,
    present: tl.tensor,
    w_ptr: tl.tensor,
    scales_ptr: tl.tensor,
    first: tl.tensor,
    begin: tl.tensor,
    N: tl.constexpr,
    K: tl.constexpr,
    STRIDE: tl.constexpr,
    GROUP: tl.constexpr,
    BLOCK_M: tl.constexpr,
    ROWS: tl.constexpr,
    SHARE: tl.constexpr,
    PAIR: tl.constexpr,
    SWAP: tl.constexpr,
    PACKED: tl.constexpr,
) -> tl.tensor:
    """The same of 4-bit weights, their scales [groups, N] (PAIR: 2 N) multiplied in."""
    FLOAT8: tl.constexpr = x_ptr.dtype.element_ty == tl.float8e4nv
    dtype = tl.float32 if FLOAT8 else tl.int32
    LINES: tl.constexpr = 2 * N if PAIR else N
    row = tl.arange(0, BLOCK_M).to(tl.int64)
    lines = w_rows(tl.arange(0, ROWS), first, N, PAIR)
    g = tl.arange(0, GROUP)
    x_offsets = row[:, None] * K + g[None, :]
    if SWAP:
        w_offsets = lines[:, None] * STRIDE + g[None, :]
        total = tl.zeros([ROWS, BLOCK_M], tl.float32)
    else:
        w_offsets = lines[None, :] * STRIDE + g[:, None]
        total = tl.zeros([BLOCK_M, ROWS], tl.float32)
    for k0 in range(begin, tl.minimum(begin + SHARE, 2 * STRIDE), 2 * GROUP):
        pair = tl.load(w_ptr + k0 // 2 + w_offsets, eviction_policy="evict_first")
        x_low = tl.load(x_ptr + k0 + x_offsets, mask=present[:, None] & ((k0 + g) < K)[None, :], other=0.0)
        k1 = k0 + GROUP
        x_high = tl.load(x_ptr + k1 + x_offsets, mask=present[:, None] & ((k1 + g) < K)[None, :], other=0.0)
        at = scales_ptr + (k0 // GROUP) * LINES + lines
        low_scale, high_scale = tl.load(at), tl.load(at + LINES)
        low, high = _nibbles(pair, FLOAT8, PACKED)
        low_sum = _multiplied(x_low, low, tl.zeros(total.shape, dtype), SWAP, "ieee").to(tl.float32)
        high_sum = _multiplied(x_high, high, tl.zeros(total.shape, dtype), SWAP, "ieee").to(tl.float32)
        if SWAP:
            total += low_sum * low_scale[:, None] + high_sum * high_scale[:, None]
        else:
            total += low_sum * low_scale[None, :] + high_sum * high_scale[None, :]
    return tl.trans(total) if SWAP else total


def pack_groups(numbers: Tensor, scales: Tensor, group: int, activations: str) -> tuple[Tensor, Tensor]:
    """4-bit weights as `grouped_product` reads them, of numbers -8 … 7 [N, K] and scales [N, K / group].

    Returns bytes [N, K' / 2] int8, K' being K up to whole pairs of groups, and scales [K' / group, N] float32. The low
    nibbles of byte j of pair p are column j of group 2 p, the high ones of group 2 p + 1. For int8 activations they are
    two's complement and the scales have the factor 1 / 16; for float8 8 is added to them and the factor is 512.
    """
    pairs = -(-numbers.shape[1] // (2 * group))
    missing = pairs * 2 * group - numbers.shape[1]
    whole = torch.nn.functional.pad(numbers.to(torch.int8), (0, missing))
    if activations == "fp8":
        whole = whole + 8
    low, high = whole.view(len(whole), pairs, 2, group).unbind(2)
    packed = (low & 15) | (high << 4)
    factor = 512.0 if activations == "fp8" else 1 / 16
    spread = torch.nn.functional.pad(scales.float() * factor, (0, missing // group))
    return packed.flatten(1).contiguous(), spread.t().contiguous()
