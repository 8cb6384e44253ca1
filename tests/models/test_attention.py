"""Paged attention against the formula written out, and the bits of the ragged form."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from server.models.attention import AttentionBatch, Row, padded_keys, padded_rows, paged_attention, write_kv
from tests.models.paging import BLOCK_SIZE, Chunk, contiguous_blocks, padded_batch, ragged_batch, scattered_blocks

SHAPES = [(1, 1, 8), (2, 3, 16), (4, 1, 32), (1, 8, 24)]
"""(kv heads, query heads each, head width)."""


def spelled_out(
    q: Tensor, kv: Tensor, start: int, scale: float, window: int | None, softcap: float | None, sinks: Tensor | None
) -> Tensor:
    """Attention of q [n, heads, D] at positions start... over kv [start + n, 2 * kv_heads, D], one query at a time."""
    heads, kv_heads = q.shape[1], kv.shape[1] // 2
    out = torch.empty_like(q)
    for i in range(q.shape[0]):
        first = 0 if window is None else max(0, start + i + 1 - window)
        for h in range(heads):
            g = h // (heads // kv_heads)
            scores = kv[first : start + i + 1, g].double() @ q[i, h].double() * scale
            if softcap is not None:
                scores = softcap * torch.tanh(scores / softcap)
            total = scores.exp().sum() + (sinks[h].double().exp() if sinks is not None else 0)
            out[i, h] = (scores.exp() @ kv[first : start + i + 1, kv_heads + g].double() / total).float()
    return out.flatten(1)


def setup(
    shape: tuple[int, int, int], chunks: list[Chunk], num_blocks: int, seed: int = 0
) -> tuple[list[Tensor], Tensor, Tensor]:
    """(queries of each chunk, a pool holding every chunk's tokens, their concatenated queries)."""
    kv_heads, group, dim = shape
    generator = torch.Generator().manual_seed(seed)
    pool = torch.randn(num_blocks * BLOCK_SIZE, 2 * kv_heads, dim, generator=generator)
    queries = [torch.randn(len(c.token_ids), kv_heads * group, dim, generator=generator) for c in chunks]
    return queries, pool, torch.cat(queries)


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("window", [None, 1, 5, 40])
@pytest.mark.parametrize("special", ["plain", "softcap", "sinks", "both"])
@pytest.mark.parametrize("form", ["ragged", "padded"])
def test_is_the_formula(shape: tuple[int, int, int], window: int | None, special: str, form: str) -> None:
    blocks = [*scattered_blocks(2, 8), list(range(17, 25))]
    sizes = (3, 3, 3) if form == "padded" else (1, 19, 6)
    chunks = [Chunk([0] * n, start, b) for n, start, b in zip(sizes, (13, 0, 26), blocks, strict=True)]
    queries, pool, q = setup(shape, chunks, 26)
    softcap = 0.7 if special in ("softcap", "both") else None
    sinks = torch.linspace(-1, 2, shape[0] * shape[1]) if special in ("sinks", "both") else None
    _, batch = (padded_batch if form == "padded" else ragged_batch)(chunks, 2)
    q = torch.cat([q, torch.full((2, *q.shape[1:]), 7.0)])
    actual = paged_attention(q, pool, batch, scale=0.3, window=window, softcap=softcap, sinks=sinks)
    at = 0
    for chunk, query in zip(chunks, queries, strict=True):
        expected = spelled_out(query, pool[chunk.places()], chunk.start, 0.3, window, softcap, sinks)
        torch.testing.assert_close(actual[at : at + len(query)], expected, atol=2e-5, rtol=1e-4)
        at += len(query)
    assert actual.shape == (at + 2, q.shape[1] * q.shape[2]) and bool(actual.isfinite().all())


@pytest.mark.parametrize("shape", [(3, 3, 64), (2, 1, 64), (1, 7, 32), (4, 4, 128)])
def test_a_tokens_bits_do_not_depend_on_how_many_are_computed(shape: tuple[int, int, int]) -> None:
    total = 700
    blocks = contiguous_blocks(1, 256)[0]
    _, pool, q = setup(shape, [Chunk([0] * total, 0, blocks)], 320)

    def window(start: int, end: int) -> Tensor:
        batch = AttentionBatch(torch.zeros(0), torch.zeros(0), rows=[Row(0, end - start, end, slice(4, 4 + end))])
        return paged_attention(q[start:end], pool, batch, scale=0.1)

    alone = {p: window(p, p + 1)[0] for p in [0, 1, 14, 15, 16, 100, 191, 192, 193, 250, 383, 384, 511, 512, 520, 699]}
    for end in (2, 17, 20, 101, 192, 200, 256, 390, 512, 515, 530, 700):
        for size in (2, 3, 4, 5, 8, 11, 16, 17, 33, 64, 101, 300, 512, 700):
            if size > end:
                continue
            together = window(end - size, end)
            for p, bits in alone.items():
                if end - size <= p < end:
                    assert torch.equal(together[p - end + size], bits), f"token {p} among {end - size}:{end}"


def test_scattered_blocks_and_the_pools_end_give_the_same_bits() -> None:
    shape, n, end, num_blocks = (2, 3, 32), 5, 50, 13
    chunk = Chunk([0] * n, end - n, list(range(1, num_blocks + 1)))
    _, pool, q = setup(shape, [chunk], num_blocks + 1)
    batch = ragged_batch([chunk])[1]
    assert len(pool) < BLOCK_SIZE + padded_keys(end), "the padded keys would lie beyond the pool"
    expected = paged_attention(q, torch.cat([pool, pool]), batch, scale=0.2)
    order = torch.randperm(num_blocks, generator=torch.Generator().manual_seed(0)) + 1
    shuffled = torch.zeros_like(pool)
    shuffled.view(num_blocks + 1, BLOCK_SIZE, -1)[order] = pool.view(num_blocks + 1, BLOCK_SIZE, -1)[1:]
    moved = Chunk(chunk.token_ids, chunk.start, order.tolist())
    for p, b in ((pool, batch), (shuffled, ragged_batch([moved])[1])):
        for _ in range(2):  # the second time, masks and places come from the batch
            assert torch.equal(paged_attention(q, p, b, scale=0.2), expected)


def test_paddings() -> None:
    assert [padded_rows(n) for n in (1, 3, 4, 5, 33)] == [4, 4, 4, 8, 36]
    assert [padded_keys(n) for n in (1, 16, 17, 192, 193, 384, 385, 512)] == [16, 16, 32, 192, 384, 384, 400, 512]
    assert [padded_keys(n) for n in (513, 705, 1024)] == [528, 896, 1024]


def test_write_kv_writes_where_told() -> None:
    pool = torch.zeros(8, 2, 3)
    write_kv(pool, torch.tensor([5, 2]), torch.ones(2, 2, 3) * torch.tensor([1.0, 2.0]).view(2, 1, 1))
    assert pool[5].eq(1).all() and pool[2].eq(2).all() and pool.count_nonzero() == 12


def test_moving_to_the_same_device_is_free() -> None:
    batch = ragged_batch([Chunk([1, 2], 0, [1])])[1]
    assert batch.to(torch.device("cpu")) is batch
    meta = batch.to(torch.device("meta"))
    assert meta.slot_mapping.device.type == meta.positions.device.type == "meta"
