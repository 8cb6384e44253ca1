"""Drives a TargetModel over a small paged pool, the way the runner does, for comparison with plain forwards."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from server.models.attention import AttentionBatch, Row
from server.models.base import TargetModel

BLOCK_SIZE = 4


@dataclass
class Chunk:
    """The next tokens of one sequence: `token_ids` at positions `start ...`, over the sequence's `blocks`."""

    token_ids: list[int]
    start: int
    blocks: list[int]

    @property
    def end(self) -> int:
        return self.start + len(self.token_ids)

    def places(self) -> list[int]:
        """Places in the pool of all tokens known after this chunk."""
        return [self.blocks[p // BLOCK_SIZE] * BLOCK_SIZE + p % BLOCK_SIZE for p in range(self.end)]


def contiguous_blocks(num_sequences: int, per_sequence: int) -> list[list[int]]:
    """Blocks side by side; block 0 is nobody's."""
    return [list(range(1 + i * per_sequence, 1 + (i + 1) * per_sequence)) for i in range(num_sequences)]


def scattered_blocks(num_sequences: int, per_sequence: int, seed: int = 0) -> list[list[int]]:
    """The same number of blocks, shuffled among all sequences."""
    order = torch.randperm(num_sequences * per_sequence, generator=torch.Generator().manual_seed(seed)) + 1
    return [[int(b) for b in part] for part in order.split(per_sequence)]


def make_pools(model: TargetModel, num_blocks: int) -> list[Tensor]:
    """Pools full of rubbish, so that reading a place that was never written shows."""
    generator = torch.Generator().manual_seed(1)
    return [
        torch.randn((num_blocks * BLOCK_SIZE, 2 * kv.num_kv_heads, kv.head_dim), generator=generator).to(model.dtype)
        for kv in model.kv_layers
    ]


def _index(places: list[int]) -> slice | Tensor:
    if places == list(range(places[0], places[0] + len(places))):
        return slice(places[0], places[0] + len(places))
    return torch.tensor(places)


def ragged_batch(chunks: list[Chunk], padding: int = 0) -> tuple[Tensor, AttentionBatch]:
    """(token_ids, batch) for rows of any length, followed by `padding` tokens that belong to nobody."""
    ids: list[int] = []
    slots: list[int] = []
    positions: list[int] = []
    rows: list[Row] = []
    for chunk in chunks:
        places = chunk.places()
        rows.append(Row(len(ids), len(chunk.token_ids), chunk.end, _index(places)))
        ids += chunk.token_ids
        slots += places[chunk.start :]
        positions += range(chunk.start, chunk.end)
    ids += [0] * padding
    slots += [i % BLOCK_SIZE for i in range(padding)]
    positions += [0] * padding
    return torch.tensor(ids), AttentionBatch(torch.tensor(slots), torch.tensor(positions), rows=rows)


def padded_batch(chunks: list[Chunk], padding: int = 0, extra_keys: int = 3) -> tuple[Tensor, AttentionBatch]:
    """(token_ids, batch) for rows of one width, gathered to the longest and `extra_keys` beyond (the null block)."""
    token_ids, ragged = ragged_batch(chunks, padding)
    length = max(chunk.end for chunk in chunks) + extra_keys
    gather = torch.tensor([chunk.places() + [0] * (length - chunk.end) for chunk in chunks])
    width = len(chunks[0].token_ids)
    assert all(len(chunk.token_ids) == width for chunk in chunks)
    return token_ids, AttentionBatch(ragged.slot_mapping, ragged.positions, gather=gather, width=width)


def step(
    model: TargetModel, pools: list[Tensor], chunks: list[Chunk], *, padding: int = 0, padded: bool = False
) -> list[Tensor]:
    """One forward; float32 logits [len(chunk), V] of every chunk."""
    token_ids, attn = (padded_batch if padded else ragged_batch)(chunks, padding)
    num_real = sum(len(chunk.token_ids) for chunk in chunks)
    with torch.inference_mode():
        logits, features = model.forward(token_ids, pools, attn, torch.arange(num_real))
    assert features is None
    return list(logits.split([len(chunk.token_ids) for chunk in chunks]))


def in_chunks(
    model: TargetModel,
    pools: list[Tensor],
    token_ids: list[int],
    blocks: list[int],
    sizes: list[int],
    *,
    padding: int = 0,
) -> Tensor:
    """Logits [L, V] of one sequence fed `sizes` tokens at a time."""
    assert sum(sizes) == len(token_ids)
    parts, start = [], 0
    for size in sizes:
        parts += step(model, pools, [Chunk(token_ids[start : start + size], start, blocks)], padding=padding)
        start += size
    return torch.cat(parts)
