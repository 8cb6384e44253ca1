"""Compiled attention over the paged pool against torch's."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import Tensor

from server.models.attention import AttentionBatch, Row, paged_attention
from server.quant.cpu.attention import results_size, scratch_size
from server.quant.cpu.barrier import BARRIER_BYTES
from server.quant.cpu.step import FEW, attention
from server.quant.cpu.team import Team
from server.quant.cpu.vectors import ISA

pytestmark = pytest.mark.skipif(ISA is None, reason="this processor lacks AVX2")
HEADS, KV_HEADS, DIM, PLACES = 6, 2, 32, 900


def compiled(qkv: Tensor, pool: Tensor, rows: list[Row], window: int | None, threads: int) -> Tensor:
    """[N, HEADS * DIM], by a team."""
    team = Team(threads)
    assert BARRIER_BYTES % 64 == 0
    out = torch.full((len(qkv), HEADS * DIM), float("nan"))
    places = [torch.arange(r.index.start, r.index.stop) if isinstance(r.index, slice) else r.index for r in rows]
    starts = np.cumsum([0, *(r.kv_len for r in rows)])
    table = np.array([[r.q_start, r.q_len, r.kv_len - r.q_len, at] for r, at in zip(rows, starts, strict=False)])
    shape = np.array([0, HEADS, KV_HEADS, DIM, 0, 0])
    results = np.full(FEW * results_size(KV_HEADS, DIM, 512), np.nan, dtype=np.float32)
    works = [np.full(scratch_size(KV_HEADS, DIM), np.nan, dtype=np.float32) for _ in range(threads)]
    fields = (
        qkv.numpy().reshape(-1), out.numpy().reshape(-1), table, torch.cat(places).numpy(), 0, len(qkv), window or 0,
        pool.data_ptr(), shape,
    )  # fmt: skip
    attention(*fields, works[0], results, 0, 0, 1)  # compiled before threads call it
    out.fill_(float("nan"))
    team.run(attention, [(*fields, works[i], results, team.barrier, i, threads) for i in range(threads)])
    _join(team)
    return out


def _join(team: Team) -> None:
    """Attention ends without a barrier: a call that does nothing but meet."""
    from server.quant.cpu.barrier import wait

    wait(team.barrier, 1)
    team.run(wait, [(team.barrier, team.size)] * team.size)


@pytest.mark.parametrize("window", [None, 5, 100])
@pytest.mark.parametrize("threads", [1, 2, 3])
@pytest.mark.parametrize("widths", [[1], [4], [1, 1, 1], [70, 3, 1], [130]])
def test_matches_torch(widths: list[int], threads: int, window: int | None) -> None:
    made = torch.Generator().manual_seed(3)
    pool = torch.randn(PLACES, 2 * KV_HEADS, DIM, generator=made)
    rows: list[Row] = []
    order, used, start = torch.randperm(400, generator=made) + 500, 0, 0
    for i, width in enumerate(widths):
        length = width + (0, 61, 63, 130)[(i + width) % 4]
        index = slice(10, 10 + length) if i % 2 == 0 else order[used : used + length]
        rows.append(Row(start, width, length, index))
        used, start = used + length, start + width
    seen = torch.zeros(PLACES, dtype=torch.bool)
    for row in rows:
        seen[row.index] = True
    qkv = torch.randn(start, (HEADS + 2 * KV_HEADS) * DIM, generator=made)
    batch = AttentionBatch(torch.zeros(start, dtype=torch.int64), torch.zeros(start, dtype=torch.int64), rows=rows)
    queries = qkv.view(start, -1, DIM)[:, :HEADS].contiguous()
    expected = paged_attention(queries, pool, batch, scale=DIM**-0.5, window=window)
    poisoned = pool.where(seen.view(-1, 1, 1), float("nan"))
    assert torch.allclose(compiled(qkv, poisoned, rows, window, threads), expected, rtol=1e-4, atol=1e-5)
