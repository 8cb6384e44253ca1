"""Products of activations and weights of 4 or 8 bits, both integers in groups of 32 columns.

A weight [O, K] lies in tiles of LANES outputs. A tile is, group by group of columns, the group's values, then LANES
scales and (where there are) LANES minimums in float16: one stream of memory. Four bits: 4 x LANES x 4 bytes; byte
[j, lane, i] has column 8 j + i in its low half and 8 j + 4 + i in its high half. Eight bits: 8 x LANES x 4 bytes;
byte [j, lane, i] is column 4 j + i, plus BYTE_OFFSET.

For each row and output the same operations run in the same order however many rows there are: integer sums of a group,
then float32 over the groups from first to last. So decoding and verifying compute the same bits.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from llvmlite import ir
from numba.core import cgutils
from numpy.typing import NDArray

from server.quant.cpu.activations import GROUP, SCALE_BYTES
from server.quant.cpu.vectors import F16, F32, I8, I32, I64, ISA, LANES, Emitter, addresses, jit, kernel
from server.quant.formats import QuantizedWeight

BYTE_OFFSET = 0 if ISA == "avx2" else 128
"""Added to 8-bit weights: `vpdpbusd` takes one unsigned operand."""
INT4_MIN, INT4, INT8 = range(3)
"""How a weight is stored: 4 bits with minimums, 4 bits centred at 8, 8 bits."""
_WIDEST = 8 if ISA == "avx512-vnni" else 4


def _integer_sums(e: Emitter, kind: int, group: ir.Value, rows: list[ir.Value], sums: list[ir.Value]) -> list[ir.Value]:
    """Adds a group's products for each row of activations to `sums`; `group` and `rows` are addresses."""
    b, size = e.b, 4 * LANES
    half, four = e.full(I8, size, 15), e.full(I8, size, 4)
    for j in range(8 if kind == INT8 else 4):
        stored = e.load(group, j * size, ir.VectorType(I8, size))
        parts = (
            [(stored, 4 * j)] if kind == INT8 else [(b.and_(stored, half), 8 * j), (b.lshr(stored, four), 8 * j + 4)]
        )
        for values, column in parts:
            for m, row in enumerate(rows):
                x = b.bitcast(e.splat(e.load(row, column, I32), LANES), stored.type)
                if kind == INT8 and ISA == "avx2":  # |w| times x with the sign of w: no sum of two passes 16 bits
                    x = e.call("llvm.x86.avx2.psign.b", x.type, x, values)
                    magnitude = e.call("llvm.abs.v32i8", x.type, values, ir.Constant(ir.IntType(1), 0))
                    sums[m] = e.dot(sums[m], magnitude, x)
                else:
                    sums[m] = e.dot(sums[m], values, x)
    return sums


def _tile(num_rows: int, kind: int) -> Any:
    """A kernel: one tile of a weight times `num_rows` rows.

    Arguments: the tile, the rows' integers, their scales, groups, where to store, bytes from a row's outputs to the
    next's, and 1 to add to what is there.
    """
    size = 4 * LANES * (8 if kind == INT8 else 4)
    stride = size + 2 * LANES * (2 if kind == INT4_MIN else 1)
    offset = {INT4_MIN: 0, INT4: 8, INT8: BYTE_OFFSET}[kind]
    floats, halves = ir.VectorType(F32, LANES), ir.VectorType(F16, LANES)

    @kernel(addresses(7))
    def tile(
        e: Emitter,
        w: ir.Value,
        q: ir.Value,
        s: ir.Value,
        groups: ir.Value,
        out: ir.Value,
        step: ir.Value,
        add: ir.Value,
    ) -> None:
        b = e.b
        totals = [e.variable(e.full(F32, LANES, 0.0)) for _ in range(num_rows)]
        row_at = [b.mul(I64(m), groups) for m in range(num_rows)]
        with cgutils.for_range(b, groups) as loop:
            group = b.add(w, b.mul(loop.index, I64(stride)))
            at = [b.add(row, loop.index) for row in row_at]
            xs = [b.add(q, b.mul(a, I64(GROUP))) for a in at]
            scales = [b.add(s, b.mul(a, I64(SCALE_BYTES))) for a in at]
            sums = [e.full(I32, LANES, 0)] * num_rows
            if offset:
                sums = [b.mul(e.splat(e.load(a, 8, I32), LANES), e.full(I32, LANES, -offset)) for a in scales]
            sums = _integer_sums(e, kind, group, xs, sums)
            scale = b.fpext(e.load(group, size, halves), floats)
            minimum = b.fpext(e.load(group, size + 2 * LANES, halves), floats) if kind == INT4_MIN else None
            for a, whole, total in zip(scales, sums, totals, strict=True):
                scaled = b.fmul(b.sitofp(whole, floats), e.splat(e.load(a, 0, F32), LANES))
                result = e.fma(scaled, scale, b.load(total))
                if minimum is not None:
                    result = e.fma(minimum, e.splat(e.load(a, 4, F32), LANES), result)
                b.store(result, total)
        adds = b.icmp_signed("!=", add, I64(0))
        for m, total in enumerate(totals):
            place = b.mul(I64(m), step)
            before = b.select(adds, e.load(out, place, floats), e.full(F32, LANES, 0.0))
            e.store(b.fadd(before, b.load(total)), out, place)

    return tile


def _multiplier(kind: int) -> Any:
    tile_1, tile_2, tile_4, tile_8 = (_tile(n, kind) for n in (1, 2, 4, _WIDEST))
    widest = _WIDEST
    row_scales, lane_bytes = SCALE_BYTES, LANES * 4
    tile_bytes = LANES * GROUP * (4 if kind != INT8 else 8) // 8 + 2 * LANES * (2 if kind == INT4_MIN else 1)

    def multiply(w, q, s, groups, out, step, rows, add, first, end):
        for t in range(first, end):
            tile, to, m = w + t * groups * tile_bytes, out + t * lane_bytes, 0
            while m + widest <= rows:
                at = m * groups
                tile_8(tile, q + at * 32, s + at * row_scales, groups, to + m * step, step, add)
                m += widest
            if m + 4 <= rows:
                at = m * groups
                tile_4(tile, q + at * 32, s + at * row_scales, groups, to + m * step, step, add)
                m += 4
            if m + 2 <= rows:
                at = m * groups
                tile_2(tile, q + at * 32, s + at * row_scales, groups, to + m * step, step, add)
                m += 2
            if m < rows:
                at = m * groups
                tile_1(tile, q + at * 32, s + at * row_scales, groups, to + m * step, step, add)

    return multiply


_int4_min, _int4, _int8 = (jit(_multiplier(kind)) for kind in (INT4_MIN, INT4, INT8))


@jit
def multiply(kind, w, q, s, groups, out, step, rows, add, first, end):
    """Tiles `first` to `end` of a weight times `rows` rows: out [rows, O] float32, `step` bytes a row.

    `q` and `s` are the rows as `activations` makes them; `add`: 1 adds to what is in `out`.
    """
    # Addresses come signed and unsigned, flags as constants: cast, each kind is compiled once, not for every mixture.
    w, q, s, out, groups, step = np.int64(w), np.int64(q), np.int64(s), np.int64(out), np.int64(groups), np.int64(step)
    rows, add, first, end = np.int64(rows), np.int64(add), np.int64(first), np.int64(end)
    if kind == 0:
        _int4_min(w, q, s, groups, out, step, rows, add, first, end)
    elif kind == 1:
        _int4(w, q, s, groups, out, step, rows, add, first, end)
    else:
        _int8(w, q, s, groups, out, step, rows, add, first, end)


@dataclass(frozen=True, slots=True)
class PackedWeight:
    """A weight [O, K] in tiles; `kind` is one of INT4_MIN, INT4, INT8."""

    kind: int
    tiles: NDArray[np.uint8]
    out_features: int
    in_features: int

    @property
    def address(self) -> int:
        """Of the first tile."""
        return int(self.tiles.ctypes.data)

    @property
    def num_tiles(self) -> int:
        """All of the outputs."""
        return self.out_features // LANES


def why_not(weight: QuantizedWeight) -> str | None:
    """Why these kernels cannot take a weight; None if they can."""
    form = weight.format
    if ISA is None:
        return "this processor lacks AVX2"
    if form.weights not in ("int4", "int8") or form.group_size != GROUP or form.activations != "int8-group":
        return f"format {form.name} is not of groups of {GROUP} with 8-bit activations"
    if form.smooth or (form.weights == "int8" and form.minimum):
        return f"format {form.name} has factors or minimums"
    if weight.shape[0] % 16:
        return f"{weight.shape[0]} outputs are not a multiple of 16"
    for scales in (weight.scales, weight.minimums):
        if scales is not None and not torch.equal(scales.half().float(), scales.float()):
            return "scales do not fit float16"
    return None


def pack(weight: QuantizedWeight) -> PackedWeight:
    """The weight in tiles, a copy. Raises ValueError where `why_not` has a reason."""
    reason = why_not(weight)
    if reason is not None:
        raise ValueError(reason)
    rows, columns = weight.shape
    tiles, groups = rows // LANES, columns // GROUP
    kind = INT8 if weight.format.weights == "int8" else INT4_MIN if weight.format.minimum else INT4
    if kind == INT8:
        stored = (weight.values.numpy().view(np.uint8) + np.uint8(BYTE_OFFSET)).reshape(tiles, LANES, groups, 8, 4)
        values = stored.transpose(0, 2, 3, 1, 4)
    else:
        pairs = weight.values.numpy()
        both = np.stack([pairs & 15, pairs >> 4], axis=-1).reshape(tiles, LANES, groups, 4, 2, 4)
        halves = both.transpose(0, 2, 3, 4, 1, 5)
        values = halves[:, :, :, 0] | (halves[:, :, :, 1] << 4)
    parts = [values.reshape(tiles, groups, -1)]
    for scales in (weight.scales, weight.minimums):
        if scales is not None:
            by_tile = scales.half().numpy().reshape(tiles, LANES, groups).transpose(0, 2, 1)
            parts.append(np.ascontiguousarray(by_tile).view(np.uint8))
    packed = aligned(tiles * groups * sum(part.shape[-1] for part in parts)).reshape(tiles, groups, -1)
    np.concatenate(parts, axis=-1, out=packed)
    return PackedWeight(kind, packed, rows, columns)


def aligned(num_bytes: int) -> NDArray[np.uint8]:
    """Bytes that start at a line of the cache."""
    whole = np.empty(num_bytes + 64, dtype=np.uint8)
    start = -whole.ctypes.data % 64
    return whole[start : start + num_bytes]
