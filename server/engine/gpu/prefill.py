"""Prompt chunks for the device: everything that the host knows of them, in one upload."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from server.core import StepPlan
from server.engine.sequence import Sequence
from server.kernels.paged import PagedRows
from server.spec.upload import to_device


@dataclass(slots=True)
class Chunks:
    """N tokens of ragged rows; `positions` and `places` in the pool are [N] int64, `ends` [R] each row's last token."""

    token_ids: Tensor
    positions: Tensor
    places: Tensor
    rows: PagedRows
    ends: NDArray[np.int64]


def pack(
    plan: StepPlan, sequences: list[Sequence], block_tables: Tensor, block_size: int, device: torch.device
) -> Chunks:
    """The chunks of a prefill step. What they see before themselves is in the pool, or will be by then."""
    lengths = np.array([row.num_tokens for row in plan.rows], dtype=np.int64)
    starts = np.array([row.start for row in plan.rows], dtype=np.int64)
    offsets = np.concatenate([[0], lengths.cumsum()])
    tokens: list[int] = []
    positions: list[NDArray[np.int64]] = []
    places: list[NDArray[np.int64]] = []
    for row, seq in zip(plan.rows, sequences, strict=True):
        end = row.start + row.num_tokens
        tokens += seq.token_ids[row.start : end]
        at = np.arange(row.start, end)
        first = row.start // block_size
        blocks = np.asarray(seq.blocks[first : -(-end // block_size)], dtype=np.int64)
        positions.append(at)
        places.append(blocks[at // block_size - first] * block_size + at % block_size)
    num, count = len(tokens), len(sequences)
    slots = np.array([seq.slot for seq in sequences], dtype=np.int64)
    parts = [np.asarray(tokens, dtype=np.int64), *positions, *places, starts, slots, offsets]
    packed = to_device(np.concatenate(parts), device)
    sizes = [num, num, num, count, count, count + 1]
    token_ids, positions_d, places_d, starts_d, slots_d, offsets_d = packed.split(sizes)
    rows = PagedRows(
        slots=slots_d,
        starts=starts_d,
        block_tables=block_tables,
        block_size=block_size,
        max_context=int((starts + lengths).max()),
        offsets=offsets_d.to(torch.int32),
        max_width=int(lengths.max()),
    )
    return Chunks(token_ids, positions_d, places_d, rows, offsets[1:] - 1)
