"""How the rows of one step see the paged KV pool: what attention kernels are told, all of it on the device.

Kernels know slots, positions and blocks, never requests.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(slots=True)
class PagedRows:
    """R rows of query tokens, one after another.

    `slots` [R] int64 is each row's line of `block_tables` [S, NB] int32; `starts` [R] int64 is the position of the
    row's first query token. Query j of row r has position `starts[r] + j` and sees positions 0 … `starts[r] + j`; the
    token at position p lies at place `block_tables[slots[r], p // block_size] * block_size + p % block_size` of the
    pool.

    `width` > 0: every row has that many query tokens (verify). `width` 0: rows are ragged (prompt chunks), row r's
    queries are tokens `offsets[r] … offsets[r + 1]` with `offsets` [R + 1] int32, and `max_width` is the longest
    (host). `max_context` is a host bound of the tokens any query sees. Tokens behind the last row's are padding.
    """

    slots: Tensor
    starts: Tensor
    block_tables: Tensor
    block_size: int
    max_context: int
    width: int = 0
    offsets: Tensor | None = None
    max_width: int = 0

    @property
    def num_rows(self) -> int:
        return self.slots.shape[0]


def places(block_tables: Tensor, slots: Tensor, positions: Tensor, block_size: int, inside: Tensor) -> Tensor:
    """Places in the pool of `positions` [R] or [R, W] int64 of the rows in `slots` [R]; the same shape, int64.

    Where `inside` (bool, that shape) is false, and past the end of the table, it is place 0 of the null block.
    """
    rows = slots if positions.dim() == 1 else slots[:, None]
    blocks = positions // block_size
    inside = inside & (blocks < block_tables.shape[1])
    found = block_tables[rows, blocks.clamp(max=block_tables.shape[1] - 1)] * block_size + positions % block_size
    return found * inside


def chain_ends(
    block_tables: Tensor, slots: Tensor, known: Tensor, limits: Tensor, block_size: int, k: int
) -> tuple[Tensor, Tensor]:
    """Where a chain of k drafts goes: positions [k + 1, R] and, but for the last, places in the pool [k, R].

    First those of each row's last known token (`known` [R] are there), then those of its drafts; nothing is written
    past a row's limit.
    """
    offsets = torch.arange(k + 1, device=known.device)
    ends = (known - 1)[:, None] + offsets
    fed = offsets[:k] <= limits[:, None]
    at = places(block_tables, slots, ends[:, :k], block_size, fed)
    return ends.t().contiguous(), at.t().contiguous()
