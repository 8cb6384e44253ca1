"""What an EAGLE-3 drafter carries: kernels read and write what their references do, and nothing else."""

from __future__ import annotations

from dataclasses import dataclass, fields, replace

import pytest
import torch
from torch import Tensor

from server.kernels.eagle3_carry import (
    KNOWN_TO,
    VALID_TO,
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
    marks: Tensor

    def copied(self) -> World:
        return replace(self, **{f.name: getattr(self, f.name).clone() for f in fields(self)})

    def window(self, k: int, read: object) -> Window:
        assert callable(read)
        found = read(
            self.slots, self.limits, self.history, self.num_tokens, self.block_tables, self.ring, self.marks,
            BLOCK_SIZE, WIDTH, k,
        )  # fmt: skip
        assert isinstance(found, Window)
        return found

    def store(self, num_emitted: Tensor, fused: Tensor, write: object) -> None:
        assert callable(write)
        write(
            self.slots, self.limits, self.num_tokens, num_emitted, self.block_tables, fused, self.ring, self.by_block,
            self.marks, BLOCK_SIZE,
        )  # fmt: skip


def world(known: dict[int, int], limits: list[int], hidden: int, device: torch.device, dtype: torch.dtype) -> World:
    """Rows of the slots in `known` (slot -> tokens), then one of padding. All of the tokens' features are known, but
    the ring's reach back for 4, 3, 9 tokens only.
    """
    back = torch.tensor([4, 3, 9, 1])
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
        marks=torch.stack([(num_tokens - back).clamp(min=1), num_tokens, num_tokens // 3, num_tokens - 2]).to(device),
    )


@pytest.mark.parametrize("hidden", HIDDENS)
@pytest.mark.parametrize("k", [1, 3, 4])
@pytest.mark.parametrize("known", [{0: 9, 2: 17}, {1: 2, 0: 5, 2: 24}, {2: 30}])
@pytest.mark.parametrize("missed", [0, 1, 3])
def test_window(
    device: torch.device, dtype: torch.dtype, known: dict[int, int], k: int, hidden: int, missed: int
) -> None:
    """Also short rows, rows that reach the end of their block table, and rows of which the drafter has not seen the
    last steps, or not written their tokens.
    """
    found = world(known, [k, 0, 1][: len(known)], hidden, device, dtype)
    found.marks[KNOWN_TO, 0] -= missed
    found.marks[VALID_TO] -= 2 * missed
    expected = found.copied()
    others = [slot for slot in range(NOBODY) if slot not in known]
    found.ring[others] = torch.nan
    ours, theirs = found.window(k, read_window), expected.window(k, read_window_reference)
    for field in fields(Window):
        assert torch.equal(getattr(ours, field.name), getattr(theirs, field.name)), field.name
    assert torch.equal(found.marks, expected.marks)
    assert bool((ours.first < found.num_tokens[found.slots]).all()), "a row sees its last token at least"


def test_window_by_hand(device: torch.device) -> None:
    case = world({1: 7}, [1], 48, device, torch.float32)
    case.marks[:, 1] = torch.tensor([4, 7, 1, 3], device=device)
    found = case.window(2, read_window)
    blocks = case.block_tables[1].tolist()
    assert found.positions[:WIDTH].tolist() == [2, 3, 4, 5, 6]
    assert found.places[:WIDTH].tolist() == [0, 0, *(blocks[1] * 4 + i for i in range(3))], (
        "features not known: nobody's"
    )
    assert found.last.tolist() == [4, WIDTH], "the padding row's only token comes first"
    assert found.ends[:, 0].tolist() == [6, 7, 8]
    assert found.end_places[:, 0].tolist() == [blocks[1] * 4 + 2, blocks[1] * 4 + 3]
    assert torch.equal(found.features[4], case.ring[1, 6])
    assert case.marks[:, 1].tolist() == [4, 7, 4, 7], "position 3 was never written"
    assert found.first.tolist() == [4, 0]


def test_a_row_whose_last_step_was_not_seen_starts_from_its_token_alone(device: torch.device) -> None:
    case = world({1: 7}, [1], 48, device, torch.float32)
    case.marks[:, 1] = torch.tensor([2, 6, 0, 6], device=device)
    found = case.window(2, read_window)
    assert found.places[: WIDTH - 1].tolist() == [0] * (WIDTH - 1)
    assert found.places[WIDTH - 1] == case.block_tables[1, 1] * 4 + 2
    assert not bool(found.features[:WIDTH].any()), "zeros, not those of another token"
    assert found.first.tolist()[0] == 6
    assert case.marks[:, 1].tolist() == [2, 6, 7, 7], "what is written now is not right: the next chain begins behind"


def test_features_after_a_gap_are_known_from_there(device: torch.device) -> None:
    case = world({0: 9, 1: 6}, [2, 2], 48, device, torch.float32)
    case.marks[KNOWN_TO, :2] = torch.tensor([7, 3], device=device)
    emitted = torch.tensor([2, 2, 1], device=device)
    case.store(emitted, torch.randn(3, 3, 48, device=device), store_features)
    assert case.marks[:2, :2].tolist() == [[5, 4], [9, 6]]


@pytest.mark.parametrize("hidden", HIDDENS)
@pytest.mark.parametrize("k", [0, 2, 4])
def test_store(device: torch.device, dtype: torch.dtype, k: int, hidden: int) -> None:
    found = world({0: 9, 2: 17, 1: 6}, [k, 0, min(k, 1)], hidden, device, dtype)
    before, expected = found.copied(), found.copied()
    emitted = torch.tensor([min(k, 2) + 1, 1, 1, 1 + k], device=device)
    fused = torch.randn(4, 1 + k, hidden, device=device).to(dtype)
    found.store(emitted, fused, store_features)
    expected.store(emitted, fused, store_features_reference)
    assert torch.equal(found.marks, expected.marks)
    assert torch.equal(found.ring[:NOBODY], expected.ring[:NOBODY])
    assert torch.equal(found.by_block[1:], expected.by_block[1:]), "all but the null block"
    assert not torch.equal(found.ring, before.ring)
    if k == 4:
        assert not torch.equal(found.by_block[1:], before.by_block[1:])
