"""The KV pool, and from sequences and their blocks to an AttentionBatch: on the host for ragged rows, on the device for
padded ones."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from server.models.attention import AttentionBatch, Row
from server.models.base import KVLayer
from server.models.host_memory import zeros


def make_pools(kv_layers: Sequence[KVLayer], places: int, dtype: torch.dtype, device: torch.device) -> list[Tensor]:
    """The KV pool, a tensor a layer: [places, 2 * kv_heads, head_dim], zeroed.

    Layers of one shape are views of one tensor, one layer after another.
    """

    def made(*shape: int) -> Tensor:
        return zeros(shape, dtype) if device.type == "cpu" else torch.zeros(shape, dtype=dtype, device=device)

    shapes = {(places, 2 * kv.num_kv_heads, kv.head_dim) for kv in kv_layers}
    if len(shapes) == 1:
        return list(made(len(kv_layers), *shapes.pop()).unbind(0))
    return [made(places, 2 * kv.num_kv_heads, kv.head_dim) for kv in kv_layers]


@dataclass(frozen=True, slots=True)
class Span:
    """Tokens `start .. start + length` of a sequence that owns `blocks`; `contiguous`: they lie side by side."""

    start: int
    length: int
    blocks: list[int]
    contiguous: bool


def side_by_side(blocks: list[int]) -> bool:
    """Whether the blocks lie one behind the other in the pool."""
    return blocks[-1] - blocks[0] == len(blocks) - 1 and blocks == list(range(blocks[0], blocks[-1] + 1))


def ragged_batch(spans: list[Span], block_size: int, num_padding: int = 0) -> AttentionBatch:
    """Batch of rows laid one after another, then `num_padding` tokens that write to the null block. CPU tensors."""
    positions: list[np.ndarray] = []
    places: list[np.ndarray] = []
    rows: list[Row] = []
    at = 0
    for span in spans:
        end = span.start + span.length
        index: slice | Tensor
        if span.contiguous:
            base = span.blocks[0] * block_size
            index = slice(base, base + end)
            places.append(np.arange(base + span.start, base + end))
        else:
            table = np.asarray(span.blocks[: -(-end // block_size)], dtype=np.int64)
            all_places = (table[:, None] * block_size + np.arange(block_size)).reshape(-1)[:end]
            index = torch.from_numpy(all_places)
            places.append(all_places[span.start :])
        positions.append(np.arange(span.start, end))
        rows.append(Row(at, span.length, end, index))
        at += span.length
    if num_padding:
        positions.append(np.zeros(num_padding, dtype=np.int64))
        places.append(np.zeros(num_padding, dtype=np.int64))
    return AttentionBatch(
        slot_mapping=torch.from_numpy(np.concatenate(places)),
        positions=torch.from_numpy(np.concatenate(positions)),
        rows=rows,
    )


def padded_batch(
    starts: Tensor, width: int, block_tables: Tensor, block_size: int, max_tokens: int, num_padding: int = 0
) -> AttentionBatch:
    """Batch of R rows of `width` tokens from `starts` [R] on; `block_tables` [R, NB]. No synchronisation.

    `max_tokens` is a host bound of tokens a row can see after this step; it sets how far rows are gathered.
    """
    device = starts.device
    positions = starts.unsqueeze(1) + torch.arange(width, device=device)
    block = torch.gather(block_tables, 1, positions // block_size)
    places = (block * block_size + positions % block_size).view(-1)
    num_blocks = min(-(-max_tokens // block_size), block_tables.shape[1])
    inside = torch.arange(block_size, device=device)
    gather = (block_tables[:, :num_blocks, None] * block_size + inside).view(starts.shape[0], -1)
    pad = places.new_zeros(num_padding)
    return AttentionBatch(
        slot_mapping=torch.cat([places, pad]),
        positions=torch.cat([positions.view(-1), pad]),
        gather=gather,
        width=width,
    )
