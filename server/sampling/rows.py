"""Between rows (sequences) and positions (the tokens of a row that one step verifies)."""

from __future__ import annotations

import torch
from torch import Tensor

from server.spec.types import Layout


def one_per_row(layout: Layout) -> bool:
    """Every row has exactly one position (there is none without), so positions are rows."""
    return layout.rows.shape[0] == layout.num_rows


def expand(per_row: Tensor, layout: Layout) -> Tensor:
    """[R, ...] of rows to [T, ...] of positions; may be `per_row` itself."""
    return per_row if one_per_row(layout) else per_row.index_select(0, layout.rows)


def spread(per_position: Tensor, layout: Layout) -> Tensor:
    """[T, ...] of positions to [R, width, ...]; zero where a ragged row is short."""
    shape = (layout.num_rows, layout.width, *per_position.shape[1:])
    if per_position.shape[0] == layout.num_rows * layout.width:
        return per_position.view(shape)
    return per_position.new_zeros(shape).index_put_((layout.rows, layout.offsets), per_position)


def first_positions(layout: Layout) -> Tensor:
    """Index [R] int64 of each row's position with offset 0."""
    num_positions = layout.rows.shape[0]
    device = layout.rows.device
    if num_positions == layout.num_rows * layout.width:
        return torch.arange(0, num_positions, layout.width, device=device)
    starts = torch.arange(num_positions, device=device) - layout.offsets
    return starts.new_zeros(layout.num_rows).index_put_((layout.rows,), starts)  # equal values wherever rows repeat
