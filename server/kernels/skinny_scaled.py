"""A residual stream as its next norm's readers want it: times the norm's weights, with partial sums of its squares.

rms_norm(x) Wᵀ = ((x * norm) Wᵀ) / rms(x) (RMSNorm: Zhang and Sennrich 2019). Whoever writes x has it in registers and
writes x * norm and the sums beside it, so the next product reads its operand as it is and only multiplies its result
by 1 / rms. Every program of the writer has columns of `squares` of its own, the first for its sum and the others for
zeros: no atomics, a fixed order, and nobody needs to know how many programs there were.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from server.kernels.runtime import ceil_div, next_power_of_2

_MOST_PARTS = 256
_FLOAT16_PRESCALE = 1 / 16
"""x * norm is not yet divided by the rms when it meets float16's range."""


@dataclass(frozen=True, slots=True)
class Scaled:
    """x [M, H] times the norm's weights and prescale(dtype): `values` [M, H], rounded to x's dtype.

    `squares` [M, square_columns(H)] float32: a row adds up to the sum of squares of its row of x.
    """

    values: Tensor
    squares: Tensor


def prescale(dtype: torch.dtype) -> float:
    """What x * norm is multiplied by before it is rounded to `dtype`."""
    return _FLOAT16_PRESCALE if dtype == torch.float16 else 1.0


def least_columns(width: int) -> int:
    """The fewest columns of x [M, `width`] that a program may own, so that its squares have few parts."""
    return max(8, next_power_of_2(ceil_div(width, _MOST_PARTS)))


def square_columns(width: int) -> int:
    """Columns of `Scaled.squares` for x [M, `width`]: a power of two."""
    return next_power_of_2(ceil_div(width, least_columns(width)))


def empty_scaled(x: Tensor) -> Scaled:
    """Room for what goes with x [M, H]."""
    squares = torch.empty(x.shape[0], square_columns(x.shape[1]), dtype=torch.float32, device=x.device)
    return Scaled(torch.empty_like(x), squares)


@triton.jit
def load_squares(
    squares_ptr: tl.tensor,
    row: tl.tensor,
    present: tl.tensor,
    PARTS: tl.constexpr,
    BLOCK_M: tl.constexpr,
) -> tl.tensor:
    """Partial sums [BLOCK_M, up to PARTS] of lines `row` of squares [., PARTS]."""
    CHUNK: tl.constexpr = PARTS if BLOCK_M * PARTS <= 4096 else 4096 // BLOCK_M
    p = tl.arange(0, CHUNK)
    at = squares_ptr + row[:, None] * PARTS + p[None, :]
    squares = tl.load(at, mask=present[:, None], other=0.0)
    for start in tl.static_range(CHUNK, PARTS, CHUNK):
        squares += tl.load(at + start, mask=present[:, None], other=0.0)
    return squares


@triton.jit
def store_squares(
    squares_ptr: tl.tensor,
    row: tl.tensor,
    present: tl.tensor,
    sums: tl.tensor,
    PARTS: tl.constexpr,
    PROGRAMS: tl.constexpr,
) -> None:
    """Writes the columns of lines `row` of squares that are this program's, of PROGRAMS <= PARTS in grid axis 0."""
    column = tl.program_id(0)
    tl.store(squares_ptr + row * PARTS + column, sums, mask=present)
    for _ in tl.static_range(PROGRAMS, PARTS, PROGRAMS):
        column += PROGRAMS
        tl.store(squares_ptr + row * PARTS + column, tl.zeros_like(sums), mask=present & (column < PARTS))


@triton.jit
def inverse_rms(squares: tl.tensor, eps: tl.tensor, K: tl.constexpr, PRESCALE: tl.constexpr) -> tl.tensor:
    """1 / (PRESCALE * rms) of each row, [BLOCK_M, 1], from what load_squares gave."""
    return (tl.rsqrt(tl.sum(squares, axis=1) / K + eps) / PRESCALE)[:, None]


def scaled_reference(x: Tensor, norm: Tensor) -> Scaled:
    """`Scaled` of x [M, H] and norm [H] in torch operations, the sums in the first column."""
    values = (x.float() * (norm.float() * prescale(x.dtype))).to(x.dtype)
    squares = torch.zeros(x.shape[0], square_columns(x.shape[1]), device=x.device)
    squares[:, 0] = x.float().square().sum(-1)
    return Scaled(values, squares)
