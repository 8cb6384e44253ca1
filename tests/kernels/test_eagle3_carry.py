"""What an EAGLE-3 drafter carries: kernels read and write what their references do, and nothing else."""

from __future__ import annotations

from dataclasses import dataclass, fields, replace

import pytest
import torch
from torch import Tensor

from server.kernels.eagle3_carry import (
    Window,
    read_window,
    read_window_reference,
    store_features,
    store_features_reference,
)
from tests.kernels.conftest import ON_GPU

BLOCK_SIZE, TABLE, LENGTH = 4, 6, 30
NUM_SLOTS, NUM_BLOCKS = 4, 20
NOBODY = NUM_SLOTS - 1
HIDDENS = [48, 4096] if ON_GPU else [48]  # no power of two; more than one copy's worth
WIDTH = 5


@dataclass
class World:
    """Slots with 1 … 24 tokens; the last one is nobody's. Features are random."""

    slots: Tensor
    limits: Tensor
    history: Tensor
    num_tokens: Tensor
    block_tables: Tensor
    ring: Tensor
    by_block: Tensor
    known_from: Tensor
    valid_from: Tensor
    written: Tensor

    def copied(self) -> World:
        return replace(self, **{f.name: getattr(self, f.name).clone() for f in fields(self)})

    def window(self, k: int, read: object) -> Window:
        assert callable(read)
        found = read(
            self.slots, self.limits, self.history, self.num_tokens, self.block_tables, self.ring, self.known_from,
            self.valid_from, self.written, BLOCK_SIZE, WIDTH, k,
        )  # fmt: skip
        assert isinstance(found, Window)
        return found

    def store(self, num_emitted: Tensor, fused: Tensor, write: object) -> None:
        assert callable(write)
        write(
            self.slots, self.limits, self.num_tokens, num_emitted, self.block_tables, fused, self.ring, self.by_block,
            BLOCK_SIZE,
        )  # fmt: skip


def world(known: dict[int, int], limits: list[int], hidden: int, device: torch.device, dtype: torch.dtype) -> World:
    """Rows of the slots in `known` (slot -> tokens), then one of padding."""
    tables = torch.zeros(NUM_SLOTS, TABLE, dtype=torch.int32)
    tables[:NOBODY] = (torch.randperm(NUM_BLOCKS - 1)[: NOBODY * TABLE] + 1).view(NOBODY, TABLE).int()
    num_tokens = torch.ones(NUM_SLOTS, dtype=torch.int64)
    for slot, count in known.items():
        num_tokens[slot] = count
    return World(
        slots=torch.tensor([*known, NOBODY], device=device),
        limits=torch.tensor([*limits, 0], device=device),
        history=torch.randint(50, (NUM_SLOTS, LENGTH), device=device),
        num_tokens=num_tokens.to(device),
        block_tables=tables.to(device),
        ring=torch.randn(NUM_SLOTS, 2 * WIDTH, hidden, device=device).to(dtype),
        by_block=torch.randn(NUM_BLOCKS, hidden, device=device).to(dtype),
        known_from=(num_tokens - torch.tensor([4, 3, 9, 1])).clamp(min=1).to(device),
        valid_from=torch.tensor([3, 0, 7, 0], device=device),
        written=torch.zeros(NUM_SLOTS, dtype=torch.int64, device=device),
    )


@pytest.mark.parametrize("hidden", HIDDENS)
@pytest.mark.parametrize("k", [1, 3, 4])
@pytest.mark.parametrize("known", [{0: 9, 2: 17}, {1: 2, 0: 5, 2: 24}, {2: 30}])
def test_window(device: torch.device, dtype: torch.dtype, known: dict[int, int], k: int, hidden: int) -> None:
    """Also short rows, and rows that reach the end of their block table."""
    found = world(known, [k, 0, 1][: len(known)], hidden, device, dtype)
    expected = found.copied()
    others = [slot for slot in range(NOBODY) if slot not in known]
    found.ring[others] = torch.nan
    ours, theirs = found.window(k, read_window), expected.window(k, read_window_reference)
    for field in fields(Window):
        assert torch.equal(getattr(ours, field.name), getattr(theirs, field.name)), field.name
    assert torch.equal(found.written, expected.written)


def test_window_by_hand(device: torch.device) -> None:
    case = world({1: 7}, [1], 48, device, torch.float32)
    case.known_from[1] = 4
    found = case.window(2, read_window)
    blocks = case.block_tables[1].tolist()
    assert found.positions[:WIDTH].tolist() == [2, 3, 4, 5, 6]
    assert found.places[:WIDTH].tolist() == [0, 0, *(blocks[1] * 4 + i for i in range(3))], (
        "before known_from: nobody's"
    )
    assert found.last.tolist() == [4, WIDTH], "the padding row's only token comes first"
    assert found.ends[:, 0].tolist() == [6, 7, 8]
    assert found.end_places[:, 0].tolist() == [blocks[1] * 4 + 2, blocks[1] * 4 + 3]
    assert torch.equal(found.features[4], case.ring[1, 6])
    assert case.written.tolist() == [0, 7, 0, 1]


@pytest.mark.parametrize("hidden", HIDDENS)
@pytest.mark.parametrize("k", [0, 2, 4])
def test_store(device: torch.device, dtype: torch.dtype, k: int, hidden: int) -> None:
    found = world({0: 9, 2: 17, 1: 6}, [k, 0, min(k, 1)], hidden, device, dtype)
    before, expected = found.copied(), found.copied()
    emitted = torch.tensor([min(k, 2) + 1, 1, 1, 1 + k], device=device)
    fused = torch.randn(4, 1 + k, hidden, device=device).to(dtype)
    found.store(emitted, fused, store_features)
    expected.store(emitted, fused, store_features_reference)
    assert torch.equal(found.ring[:NOBODY], expected.ring[:NOBODY])
    assert torch.equal(found.by_block[1:], expected.by_block[1:]), "all but the null block"
    assert not torch.equal(found.ring, before.ring)
    if k == 4:
        assert not torch.equal(found.by_block[1:], before.by_block[1:])
