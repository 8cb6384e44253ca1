from __future__ import annotations

import pytest
import torch
from torch import Tensor

from server.kernels.gather import (
    apply_block_updates,
    apply_block_updates_reference,
    gather_inputs,
    gather_inputs_reference,
    select_rows,
    select_rows_reference,
)
from tests.kernels.conftest import ON_GPU

SLOTS, LENGTH, BLOCKS, BLOCK_SIZE = 6, 48, 12, 4
ROWS = [[0], [3, 1, 4], [2, 5, 5, 0]]


def state(device: torch.device) -> tuple[Tensor, Tensor, Tensor]:
    """(history, num_tokens, block_tables); the last slot is nobody's. What lies past num_tokens is garbage."""
    history = torch.randint(1000, (SLOTS, LENGTH), device=device)
    num_tokens = torch.tensor([1, 4, 5, 48, 17, 1], device=device)
    history[torch.arange(LENGTH, device=device) >= num_tokens.unsqueeze(1)] = -(2**40)
    tables = torch.randint(1, 2**20, (SLOTS, BLOCKS), device=device, dtype=torch.int32)
    tables[-1] = 0
    return history, num_tokens, tables


@pytest.mark.parametrize("rows", ROWS)
@pytest.mark.parametrize("k", [None, 0, 1, 4, 16])
def test_inputs_equal_reference(rows: list[int], k: int | None, device: torch.device) -> None:
    history, num_tokens, tables = state(device)
    slots = torch.tensor(rows, device=device)
    drafts = None if k is None else torch.randint(1000, (len(rows), k), device=device)
    limits = torch.randint(0, 1 + (k or 0), (len(rows),), device=device)
    for most in (None, limits):
        found = gather_inputs(slots, drafts, history, num_tokens, tables, BLOCK_SIZE, most)
        expected = gather_inputs_reference(slots, drafts, history, num_tokens, tables, BLOCK_SIZE, most)
        for ours, theirs in zip(found, expected, strict=True):
            assert ours.dtype == torch.int64
            assert torch.equal(ours, theirs)


def test_drafts_beyond_a_rows_limit_have_no_place(device: torch.device) -> None:
    history, num_tokens, tables = state(device)
    drafts = torch.tensor([[11, 12, 13]], device=device)
    limits = torch.tensor([1], device=device)
    *_, places = gather_inputs(
        torch.tensor([1], device=device), drafts, history, num_tokens, tables, BLOCK_SIZE, limits
    )
    assert (places >= BLOCK_SIZE).tolist() == [True, True, False, False]


def test_inputs_by_hand(device: torch.device) -> None:
    history, num_tokens, tables = state(device)
    tables[1, :3] = torch.tensor([7, 2**20, 3])
    drafts = torch.tensor([[11, 12], [13, 14]], device=device)
    slots = torch.tensor([1, 3], device=device)
    tokens, starts, positions, places = gather_inputs(slots, drafts, history, num_tokens, tables, BLOCK_SIZE)
    assert tokens.tolist() == [int(history[1, 3]), 11, 12, int(history[3, 47]), 13, 14]
    assert starts.tolist() == [3, 47]
    assert positions.tolist() == [3, 4, 5, 47, 48, 49]
    assert places.tolist()[:3] == [7 * 4 + 3, 2**22, 2**22 + 1]
    assert places.tolist()[4:] == [0, 1]  # past the table's end: block 0, not the next slot's


@pytest.mark.parametrize("count", [0, 1, 5, 300])
def test_updates_equal_reference(count: int, device: torch.device) -> None:
    slots, blocks = (40, 64) if ON_GPU else (20, 16)
    tables = torch.zeros(slots, blocks, dtype=torch.int32, device=device)
    where = torch.randperm((slots - 1) * blocks, device=device)[:count]
    updates = torch.stack([where // blocks, where % blocks, torch.arange(count, device=device) + 1], dim=1)
    padding = torch.tensor([[slots - 1, 0, 0]], device=device).expand(count // 2, 3)
    both = torch.cat([updates, padding]).int()
    expected = tables.clone()
    apply_block_updates_reference(both, expected)
    apply_block_updates(both, tables)
    assert torch.equal(tables, expected)
    assert int(tables[-1].abs().sum()) == 0


@pytest.mark.parametrize("shape", [(2, 64, 48), (3, 16, 100), *([(32, 128, 4096)] if ON_GPU else [])])
def test_selected_rows_equal_reference(device: torch.device, dtype: torch.dtype, shape: tuple[int, int, int]) -> None:
    heads, dim, hidden = shape
    qkv = torch.randn(7, heads * dim + 40, device=device).to(dtype)
    x = torch.randn(7, 2 * hidden, device=device).to(dtype)[:, hidden:]
    queries, at = qkv[:, : heads * dim].unflatten(1, (heads, dim)), torch.tensor([6, 0, 3], device=device)
    qkv[1] = torch.nan
    for found, expected in zip(select_rows(queries, x, at), select_rows_reference(queries, x, at), strict=True):
        assert torch.equal(found, expected) and found.is_contiguous()
