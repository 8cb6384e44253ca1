"""Random paged rows whose every place that nobody may read holds NaN."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from server.kernels.attention import attention_reference
from server.kernels.paged import PagedRows


@dataclass(frozen=True)
class Shape:
    """Heads, key heads, head size, block size."""

    heads: int = 4
    kv_heads: int = 2
    dim: int = 64
    block_size: int = 16


@dataclass(frozen=True)
class Paged:
    q: Tensor
    pool: Tensor
    rows: PagedRows

    def reference(self, **how: Any) -> Tensor:
        return attention_reference(self.q, self.pool, self.rows, scale=self.scale, **how)

    @property
    def scale(self) -> float:
        return float(self.q.shape[-1] ** -0.5)


def contexts(
    shape: Shape, widths: list[int], starts: list[int], device: torch.device, dtype: torch.dtype, padding: int = 0
) -> Paged:
    """Row r has widths[r] queries from position starts[r] on. `padding`: so many tokens behind the last row."""
    lengths = [start + width for start, width in zip(starts, widths, strict=True)]
    num_rows, per_row = len(widths), -(-max(lengths) // shape.block_size) + 1
    num_blocks = num_rows * per_row + 3
    pool = torch.full((num_blocks * shape.block_size, 2 * shape.kv_heads, shape.dim), float("nan"))
    tables = torch.full((num_rows + 2, per_row), num_blocks - 1)  # beyond a row's tokens: a poisoned block
    slots = torch.randperm(num_rows + 1)[:num_rows]
    free = (torch.randperm(num_blocks - 2) + 1).tolist()
    for slot, length in zip(slots.tolist(), lengths, strict=True):
        used = -(-length // shape.block_size)
        tables[slot, :used] = torch.tensor(free[:used])
        free = free[used:]
        places = tables[slot].repeat_interleave(shape.block_size)[:length] * shape.block_size
        places += torch.arange(length) % shape.block_size
        pool[places] = torch.randn(length, *pool.shape[1:])
    total = sum(widths)
    fused = torch.randn(total + padding, (shape.heads + 2 * shape.kv_heads) * shape.dim)
    fused[total:] = float("nan")
    offsets = torch.tensor([0, *widths]).cumsum(0).int()
    rows = PagedRows(
        slots.to(device),
        torch.tensor(starts, device=device),
        tables.int().to(device),
        shape.block_size,
        max(lengths),
        offsets=offsets.to(device),
        max_width=max(widths),
    )
    q = fused.to(device, dtype)[:, : shape.heads * shape.dim].view(total + padding, shape.heads, shape.dim)
    return Paged(q, pool.to(device, dtype), rows)


def uniform(shape: Shape, width: int, lengths: list[int], device: torch.device, dtype: torch.dtype) -> Paged:
    """Rows of `width` queries whose last one sees lengths[r] tokens."""
    case = contexts(shape, [width] * len(lengths), [n - width for n in lengths], device, dtype)
    return replace(case, rows=replace(case.rows, offsets=None, max_width=0, width=width))


def part(case: Paged, row: int, first: int, behind: int) -> Paged:
    """Only queries first … behind - 1 of one row, as a chunk of its own."""
    rows = case.rows
    offset = int(rows.offsets[row]) if rows.offsets is not None else row * rows.width
    chunk = replace(
        rows,
        slots=rows.slots[row : row + 1],
        starts=rows.starts[row : row + 1] + first,
        offsets=torch.tensor([0, behind - first], dtype=torch.int32, device=rows.slots.device),
        max_width=behind - first,
        width=0,
    )
    return Paged(case.q[offset + first : offset + behind], case.pool, chunk)


def as_width(case: Paged) -> Paged:
    """A chunk of a single row as a verify row."""
    return replace(case, rows=replace(case.rows, width=case.q.shape[0], offsets=None, max_width=0))
