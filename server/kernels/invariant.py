"""Batch-invariant matrix product for deterministic mode: a row's bits depend on that row and the weights alone.

A library picks its tile, its K split and so its order of summation by the number of rows; plain decoding (one row a
sequence), verification (1 + k) and prefill would round differently. Here every element of the result is one float32
accumulator that takes K in rising order, never split, never reduced across programs (He et al. 2025, "Defeating
Nondeterminism in LLM Inference").

Tiles do change with the shape, since none serves both ends: 64 × 32 keeps the memory busy in decoding, but would run
prefill at a fraction of the arithmetic rate. What they may not change is an element's chain of operations. In 16 bits
every tile has at least 64 rows, so Hopper computes all of them with one instruction, `wgmma` m64nNk16: an element takes
16 products at a time, in rising K, into its own accumulator, whatever N is, whatever the other rows hold and however
deep a block of K is; zeros that fill up the last block add nothing. In float32 there is one tile. That the instruction
rounds alike for every N is not documented, so `tiles_agree` compares the tiles bit by bit: call it before promising
anything, and pass `tile=SMALL` always where it says no.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from server.kernels.runtime import INTERPRETED, ceil_div, dot_precision, num_sms


@dataclass(frozen=True, slots=True)
class Tile:
    """One program's work: `rows` × `columns` of the result, `depth` of K at a time, `stages` blocks in flight.

    Taken from `min_rows` rows of x on, where it makes enough programs to fill the GPU.
    """

    rows: int
    columns: int
    depth: int
    warps: int
    stages: int
    min_rows: int = 0

    def num_programs(self, num_rows: int, num_columns: int) -> int:
        return ceil_div(num_rows, self.rows) * ceil_div(num_columns, self.columns)


SMALL = Tile(64, 32, 128, warps=4, stages=5)
MEDIUM = Tile(64, 128, 64, warps=4, stages=4, min_rows=33)
LARGE = Tile(128, 256, 64, warps=8, stages=3, min_rows=257)
FLOAT32 = Tile(64, 64, 32, warps=4, stages=3)
_INTERPRETED = Tile(16, 32, 64, warps=4, stages=1)
"""One for all under the interpreter: NumPy's products promise nothing from shape to shape."""

_ROW_TILES_A_GROUP = 8


@triton.jit(do_not_specialize=["num_rows"])
def _linear_kernel(
    x_ptr: tl.tensor,
    weight_ptr: tl.tensor,
    bias_ptr: tl.tensor,
    out_ptr: tl.tensor,
    num_rows: tl.tensor,
    num_columns: tl.tensor,
    depth: tl.tensor,
    x_stride: tl.tensor,
    weight_stride: tl.tensor,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    DEPTH: tl.constexpr,
    EVEN: tl.constexpr,
    GROUP: tl.constexpr,
    BIAS: tl.constexpr,
    PRECISION: tl.constexpr,
) -> None:
    # Programs that run at the same time share blocks of x and of the weight in L2: GROUP tiles of rows, then columns.
    program = tl.program_id(0)
    column_tiles = tl.cdiv(num_columns, COLUMNS)
    group = program // (GROUP * column_tiles)
    size = tl.minimum(tl.cdiv(num_rows, ROWS) - group * GROUP, GROUP)
    inner = program % (GROUP * column_tiles)
    rows = (group * GROUP + inner % size) * ROWS + tl.arange(0, ROWS)
    columns = (inner // size) * COLUMNS + tl.arange(0, COLUMNS)
    ks = tl.arange(0, DEPTH)
    some_rows = (rows < num_rows)[:, None]
    some_columns = (columns < num_columns)[None, :]
    x_at = x_ptr + rows.to(tl.int64)[:, None] * x_stride + ks[None, :]
    weight_at = weight_ptr + columns.to(tl.int64)[None, :] * weight_stride + ks[:, None]
    total = tl.zeros((ROWS, COLUMNS), tl.float32)
    for start in range(0, depth, DEPTH):
        if EVEN:
            x = tl.load(x_at + start, mask=some_rows, other=0.0)
            weight = tl.load(weight_at + start, mask=some_columns, other=0.0)
        else:
            left = depth - start
            x = tl.load(x_at + start, mask=some_rows & (ks < left)[None, :], other=0.0)
            weight = tl.load(weight_at + start, mask=some_columns & (ks < left)[:, None], other=0.0)
        total = tl.dot(x, weight, total, input_precision=PRECISION)
    if BIAS:
        total += tl.load(bias_ptr + columns, mask=columns < num_columns, other=0.0).to(tl.float32)[None, :]
    out_at = out_ptr + rows.to(tl.int64)[:, None] * num_columns + columns[None, :]
    tl.store(out_at, total.to(out_ptr.dtype.element_ty), mask=some_rows & some_columns)


def tile_for(num_rows: int, num_columns: int, dtype: torch.dtype, device: torch.device) -> Tile:
    """The largest tile that still fills three quarters of the GPU's multiprocessors."""
    if INTERPRETED:
        return _INTERPRETED
    if dtype == torch.float32:
        return FLOAT32
    enough = num_sms(device) * 3 // 4
    for tile in (LARGE, MEDIUM):
        if num_rows >= tile.min_rows and tile.num_programs(num_rows, num_columns) >= enough:
            return tile
    return SMALL


def linear(x: Tensor, weight: Tensor, bias: Tensor | None = None, tile: Tile | None = None) -> Tensor:
    """`x @ weight.T + bias` [M, N] of x [M, K], weight [N, K] (both with K contiguous) and bias [N]; rounded once.

    The bits of row m depend on x[m], weight and bias alone, for float32, float16 and bfloat16. `tile` None: by shape.
    """
    (num_rows, depth), num_columns = x.shape, weight.shape[0]
    out = torch.empty((num_rows, num_columns), dtype=x.dtype, device=x.device)
    if num_rows == 0:
        return out
    tile = tile or tile_for(num_rows, num_columns, x.dtype, x.device)
    _linear_kernel[(tile.num_programs(num_rows, num_columns),)](
        x,
        weight,
        x if bias is None else bias,
        out,
        num_rows,
        num_columns,
        depth,
        x.stride(0),
        weight.stride(0),
        ROWS=tile.rows,
        COLUMNS=tile.columns,
        DEPTH=tile.depth,
        EVEN=depth % tile.depth == 0,
        GROUP=_ROW_TILES_A_GROUP,
        BIAS=bias is not None,
        PRECISION=dot_precision(x.dtype),
        num_warps=tile.warps,
        num_stages=tile.stages,
    )
    return out


def tiles_agree(device: torch.device, dtype: torch.dtype) -> bool:
    """Whether all tiles give the same bits on this device, on numbers of very different sizes. Synchronises.

    Hidden bits of the accumulation show where large products cancel and small ones remain.
    """
    if dtype == torch.float32 or INTERPRETED:
        return True
    generator = torch.Generator(device).manual_seed(0)

    def numbers(rows: int) -> Tensor:
        values = torch.randn(rows, 1000, generator=generator, device=device)
        sizes = torch.randint(-6, 7, values.shape, generator=generator, device=device)
        return (values * torch.exp2(sizes)).to(dtype)

    x, weight = numbers(200), numbers(300)
    results = [linear(x, weight, tile=tile) for tile in (SMALL, MEDIUM, LARGE)]
    return all(torch.equal(results[0], other) for other in results[1:])


def linear_reference(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """`linear` in torch operations, but for the bits."""
    out = x.float() @ weight.float().T
    return (out if bias is None else out + bias.float()).to(x.dtype)
