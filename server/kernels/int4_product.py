"""4-bit weights that meet activations as they come (W4A16): how they are packed, multiplied, unpacked.

What bounds such a product on a GPU is turning nibbles into numbers, not reading them, so they are packed for that: a
16-bit word holds one column of four consecutive groups of K, the first in its low nibble. A tile of words is then four
tiles of W in the layout that the tensor core wants of 16-bit operands, each of one group, and two words of a register
become two numbers by one `and`-`or`: 0x4300 | q is 128 + q in bfloat16 (0x6400 | q is 1024 + q in float16). The
offset is taken off again, exactly too, so what is multiplied are the stored integers; scales are applied to the float32
sums of each group, and minimums to the group's sum of x. Eleven instructions for eight weights (the idea is Marlin's,
arXiv 2408.11743, section 3.2).
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from server.kernels.runtime import INTERPRETED, ceil_div
from server.kernels.skinny_product import w_rows

WORD = 4
"""Groups of K that share a word."""

_BODY = """{ .reg .b32 t, one, off;
mov.b32 one, ONE; mov.b32 off, OFF;
lop3.b32 t, $4, 0x000F000F, MAGIC, 0xEA; FMA $0, t, one, off;
shr.b32 t, $4, 4; lop3.b32 t, t, 0x000F000F, MAGIC, 0xEA; FMA $1, t, one, off;
shr.b32 t, $4, 8; lop3.b32 t, t, 0x000F000F, MAGIC, 0xEA; FMA $2, t, one, off;
shr.b32 t, $4, 12; lop3.b32 t, t, 0x000F000F, MAGIC, 0xEA; FMA $3, t, one, off; }"""


def _asm(magic: str, one: str, off: str, fma: str) -> tl.constexpr:
    words = {"MAGIC": magic, "ONE": one, "OFF": off, "FMA": fma}
    text = _BODY
    for word, value in words.items():
        text = text.replace(word, value)
    return tl.constexpr(text)


_BF16 = "0x43004300", "0x3F803F80"
_FP16 = "0x64006400", "0x3C003C00"
_BF16_CENTRED = _asm(*_BF16, "0xC308C308", "fma.rn.bf16x2")
_BF16_FROM_0 = _asm(*_BF16, "0xC300C300", "fma.rn.bf16x2")
_FP16_CENTRED = _asm(*_FP16, "0xE408E408", "fma.rn.f16x2")
_FP16_FROM_0 = _asm(*_FP16, "0xE400E400", "fma.rn.f16x2")


@triton.jit
def quads(w: tl.tensor, dtype: tl.constexpr, MINIMUM: tl.constexpr, PACKED: tl.constexpr):
    """Four tiles of `dtype` from a tile of words: the numbers 0 … 15 with MINIMUM, else less 8.

    PACKED works on two words at once, for 16-bit types: not under the interpreter.
    """
    if PACKED and dtype == tl.bfloat16:
        ASM: tl.constexpr = _BF16_FROM_0 if MINIMUM else _BF16_CENTRED
        a, b, c, d = tl.inline_asm_elementwise(
            ASM, "=r,=r,=r,=r,r", [w], dtype=(tl.bfloat16, tl.bfloat16, tl.bfloat16, tl.bfloat16), is_pure=True, pack=2
        )
    elif PACKED and dtype == tl.float16:
        HALF_ASM: tl.constexpr = _FP16_FROM_0 if MINIMUM else _FP16_CENTRED
        a, b, c, d = tl.inline_asm_elementwise(
            HALF_ASM, "=r,=r,=r,=r,r", [w], dtype=(tl.float16, tl.float16, tl.float16, tl.float16), is_pure=True, pack=2
        )
    else:
        OFFSET: tl.constexpr = 0 if MINIMUM else 8
        wide = w.to(tl.int32)
        a = ((wide & 15) - OFFSET).to(dtype)
        b = (((wide >> 4) & 15) - OFFSET).to(dtype)
        c = (((wide >> 8) & 15) - OFFSET).to(dtype)
        d = (((wide >> 12) & 15) - OFFSET).to(dtype)
    return a, b, c, d


@triton.jit
def _load_x(
    x_ptr: tl.tensor,
    offsets: tl.tensor,
    present: tl.tensor,
    k: tl.tensor,
    g: tl.tensor,
    K: tl.constexpr,
    WHOLE: tl.constexpr,
) -> tl.tensor:
    """Columns k + g of x; those beyond K are zeros."""
    if WHOLE:
        x = tl.load(x_ptr + k + offsets, mask=present[:, None], other=0.0)
    else:
        x = tl.load(x_ptr + k + offsets, mask=present[:, None] & ((k + g) < K)[None, :], other=0.0)
    return x


@triton.jit
def _four(table_ptr: tl.tensor, at: tl.tensor, lines: tl.tensor, LINES: tl.constexpr):
    """A table's entries of groups `at` to `at` + 3 for rows `lines` of W."""
    first = table_ptr + at * LINES + lines
    return tl.load(first), tl.load(first + LINES), tl.load(first + 2 * LINES), tl.load(first + 3 * LINES)


@triton.jit
def _added(
    total: tl.tensor,
    x: tl.tensor,
    w: tl.tensor,
    scale: tl.tensor,
    least: tl.tensor,
    MINIMUM: tl.constexpr,
    SWAP: tl.constexpr,
    PRECISION: tl.constexpr,
) -> tl.tensor:
    """Adds a group's share to `total`: its scale times x w, and its minimum times the sum of x."""
    if SWAP:
        total += tl.dot(w, tl.trans(x), input_precision=PRECISION) * scale.to(tl.float32)[:, None]
    else:
        total += tl.dot(x, w, input_precision=PRECISION) * scale.to(tl.float32)[None, :]
    if MINIMUM:
        sums = tl.sum(x.to(tl.float32), axis=1)
        if SWAP:
            total += least.to(tl.float32)[:, None] * sums[None, :]
        else:
            total += sums[:, None] * least.to(tl.float32)[None, :]
    return total


@triton.jit
def quad_product(
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
    MINIMUM: tl.constexpr,
    BLOCK_M: tl.constexpr,
    ROWS: tl.constexpr,
    SHARE: tl.constexpr,
    PAIR: tl.constexpr,
    SWAP: tl.constexpr,
    PRECISION: tl.constexpr,
    PACKED: tl.constexpr,
) -> tl.tensor:
    """Sums [BLOCK_M, ROWS] float32 of x [., K] times rows of W as `pack_quads` returned it, from k = `begin` on."""
    LINES: tl.constexpr = 2 * N if PAIR else N
    STORED: tl.constexpr = 4 * STRIDE // GROUP
    WHOLE: tl.constexpr = 4 * STRIDE == K
    dtype: tl.constexpr = x_ptr.dtype.element_ty
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
    at = tl.minimum(begin // GROUP, STORED - 4)  # a part beyond the last group has no step, but loads these
    least_ptr = scales_ptr + STORED * LINES
    s0, s1, s2, s3 = _four(scales_ptr, at, lines, LINES)
    l0, l1, l2, l3 = _four(least_ptr, at, lines, LINES) if MINIMUM else (s0, s1, s2, s3)
    for k0 in range(begin, tl.minimum(begin + SHARE, 4 * STRIDE), 4 * GROUP):
        words = tl.load(w_ptr + k0 // 4 + w_offsets, eviction_policy="evict_first")
        x0 = _load_x(x_ptr, x_offsets, present, k0, g, K, WHOLE)
        x1 = _load_x(x_ptr, x_offsets, present, k0 + GROUP, g, K, WHOLE)
        x2 = _load_x(x_ptr, x_offsets, present, k0 + 2 * GROUP, g, K, WHOLE)
        x3 = _load_x(x_ptr, x_offsets, present, k0 + 3 * GROUP, g, K, WHOLE)
        # Scales of the next step: Triton's pipeline leaves them out, and no product may wait for them.
        at = tl.minimum(at + 4, STORED - 4)
        n0, n1, n2, n3 = _four(scales_ptr, at, lines, LINES)
        m0, m1, m2, m3 = _four(least_ptr, at, lines, LINES) if MINIMUM else (n0, n1, n2, n3)
        w0, w1, w2, w3 = quads(words, dtype, MINIMUM, PACKED)
        total = _added(total, x0, w0, s0, l0, MINIMUM, SWAP, PRECISION)
        total = _added(total, x1, w1, s1, l1, MINIMUM, SWAP, PRECISION)
        total = _added(total, x2, w2, s2, l2, MINIMUM, SWAP, PRECISION)
        total = _added(total, x3, w3, s3, l3, MINIMUM, SWAP, PRECISION)
        s0, s1, s2, s3 = n0, n1, n2, n3
        l0, l1, l2, l3 = m0, m1, m2, m3
    return tl.trans(total) if SWAP else total


@triton.jit
def _unpack_kernel(
    w_ptr: tl.tensor,
    scales_ptr: tl.tensor,
    out_ptr: tl.tensor,
    N: tl.constexpr,
    K: tl.constexpr,
    STRIDE: tl.constexpr,
    GROUP: tl.constexpr,
    MINIMUM: tl.constexpr,
    ROWS: tl.constexpr,
    PACKED: tl.constexpr,
) -> None:
    """Writes W in float32 arithmetic, rounded once, ROWS of it and four groups a program."""
    quad = tl.program_id(0)
    lines = (tl.program_id(1) * ROWS + tl.arange(0, ROWS)).to(tl.int64)
    g = tl.arange(0, GROUP)
    inside = lines < N
    words = tl.load(w_ptr + lines[:, None] * STRIDE + quad * GROUP + g[None, :], mask=inside[:, None], other=0)
    STORED: tl.constexpr = 4 * STRIDE // GROUP
    w0, w1, w2, w3 = quads(words, tl.bfloat16 if PACKED else tl.float32, MINIMUM, PACKED)
    for i in tl.static_range(4):
        w = (w0 if i == 0 else w1 if i == 1 else w2 if i == 2 else w3).to(tl.float32)
        at = scales_ptr + (4 * quad + i) * N + lines
        w *= tl.load(at, mask=inside, other=0.0).to(tl.float32)[:, None]
        if MINIMUM:
            w += tl.load(at + STORED * N, mask=inside, other=0.0).to(tl.float32)[:, None]
        k = (4 * quad + i) * GROUP + g
        mask = inside[:, None] & (k < K)[None, :]
        tl.store(out_ptr + lines[:, None] * K + k[None, :], w.to(out_ptr.dtype.element_ty), mask=mask)


def unpacked(values: Tensor, scales: Tensor, columns: int, group: int, dtype: torch.dtype, *, minimum: bool) -> Tensor:
    """W [N, K] of `dtype`, K = `columns`, of what `pack_quads` returned."""
    rows, stride = values.shape
    out = torch.empty(rows, columns, dtype=dtype, device=values.device)
    block = max(16, 4096 // group)
    _unpack_kernel[(stride // group, ceil_div(rows, block))](
        values, scales, out,
        N=rows, K=columns, STRIDE=stride, GROUP=group, MINIMUM=minimum, ROWS=block, PACKED=not INTERPRETED,
        num_warps=8,
    )  # fmt: skip
    return out


def pack_quads(numbers: Tensor, scales: Tensor, minimums: Tensor | None, group: int) -> tuple[Tensor, Tensor]:
    """4-bit weights as `quad_product` reads them, of their stored integers 0 … 15, uint8 [N, K].

    `scales` and `minimums` [N, K / group]. Returns words int16 [N, K' / 4], K' being K up to whole words of four
    groups, and scales [K' / group, N], minimums behind them; of their own type where it has 16 bits, else float32.
    """
    rows, columns = numbers.shape
    count = ceil_div(columns, WORD * group)
    missing = count * WORD * group - columns
    whole = torch.nn.functional.pad(numbers, (0, missing)).view(rows, count, WORD, group).to(torch.int16)
    words = whole[:, :, 0] | whole[:, :, 1] << 4 | whole[:, :, 2] << 8 | whole[:, :, 3] << 12
    tables = [scales] if minimums is None else [scales, minimums]
    wide = any(table.dtype.itemsize != 2 or table.dtype != scales.dtype for table in tables)
    spread = [
        torch.nn.functional.pad(table.float() if wide else table, (0, missing // group)).t().contiguous()
        for table in tables
    ]
    return words.flatten(1).contiguous(), torch.cat(spread)
