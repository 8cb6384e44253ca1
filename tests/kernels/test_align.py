"""The alignment kernel drops from a continuation what was emitted since, and counts what is left of it."""

from __future__ import annotations

import pytest
import torch

from draft_models.suffix import align
from server.kernels.align import COUNT_BITS, LONGEST, MATCH, align_drafts, align_reference, copy_drafts, copy_reference
from server.spec.types import SlotState

L = 64


@pytest.mark.parametrize("k", [1, 3, 4, 7])
def test_equals_align(device: torch.device, k: int) -> None:
    num_slots, width = 40, 2 * (k + 1)
    history = torch.randint(2, (num_slots, L), device=device)
    num_tokens = torch.randint(1, L - k, (num_slots,), device=device)
    slots = torch.randperm(num_slots, device=device)
    unseen = torch.randint(0, width + 2, (num_slots,), device=device)
    seen = (num_tokens[slots] - unseen).clamp(min=0)
    predicted = torch.randint(2, (num_slots, width), device=device)
    true = history[slots[:, None], (seen[:, None] + torch.arange(width, device=device)).clamp(max=L - 1)]
    predicted = torch.where(torch.rand(num_slots, 1, device=device) < 0.7, true, predicted)
    length = torch.randint(0, width + 1, (num_slots, 1), device=device)
    predicted[torch.arange(width, device=device) >= length] = -1
    limits = torch.randint(0, k + 1, (num_slots,), device=device)
    uploads = torch.cat([seen[:, None], limits[:, None], predicted], 1)

    drafts, num_valid = align_drafts(uploads, history, slots, num_tokens, k)
    expected, valid = align(predicted, seen, SlotState(history, num_tokens, num_tokens), slots, k)
    assert torch.equal(num_valid, torch.minimum(valid.sum(1), limits))
    assert (num_valid > 0).any() and (num_valid == 0).any()
    assert ((drafts >= 0) & (drafts < 2)).all()
    counts = torch.arange(k, device=device) < num_valid[:, None]
    assert torch.equal(drafts[counts], expected[counts])
    reference, reference_valid = align_reference(uploads, history, slots, num_tokens, k)
    assert torch.equal(reference_valid, num_valid) and torch.equal(reference[counts], drafts[counts])


def test_padding_row_gets_nothing(device: torch.device) -> None:
    history = torch.zeros(2, L, dtype=torch.int64, device=device)
    one = torch.ones(1, dtype=torch.int64, device=device)
    uploads = torch.zeros(1, 2 + 10, dtype=torch.int64, device=device)
    drafts, num_valid = align_drafts(uploads, history, one, torch.ones(2, dtype=torch.int64, device=device), 4)
    assert num_valid.tolist() == [0] and drafts.tolist() == [[0, 0, 0, 0]]


@pytest.mark.parametrize("k", [1, 3, 7])
def test_copies_where_the_match_is_worth_it_by_now(device: torch.device, k: int) -> None:
    num_slots, width = 60, 2 * (k + 1)
    history = torch.randint(2, (num_slots, L), device=device)
    num_tokens = torch.randint(1, L - k, (num_slots,), device=device)
    slots = torch.randperm(num_slots, device=device)
    unseen = torch.randint(0, width, (num_slots,), device=device)
    seen = (num_tokens[slots] - unseen).clamp(min=0)
    predicted = history[slots[:, None], (seen[:, None] + torch.arange(width, device=device)).clamp(max=L - 1)]
    predicted[torch.rand(num_slots, device=device) < 0.2, 0] = -1
    limits = torch.randint(0, k + 1, (num_slots,), device=device)
    match = torch.stack(
        [
            torch.randint(0, 14, (num_slots,), device=device),
            10 * torch.randint(0, 8, (num_slots,), device=device),
            torch.randint(-1, 1 << 10, (num_slots,), device=device),
        ],
        1,
    )
    assert match.shape[1] == MATCH
    uploads = torch.cat([seen[:, None], limits[:, None], predicted, match], 1)
    found = copy_drafts(uploads, history, slots, num_tokens, k)
    expected = copy_reference(uploads, history, slots, num_tokens, k)
    for mine, theirs in zip(found[1:], expected[1:], strict=True):
        assert mine.dtype == theirs.dtype and torch.equal(mine, theirs)
    drafts, copied, counts, origins = found
    assert torch.equal(drafts[copied], expected[0][copied]) and ((drafts >= 0) & (drafts < 2)).all()
    assert (counts > 0).any() and (counts == 0).any()
    _, all_of_them = align_drafts(uploads[:, :-MATCH], history, slots, num_tokens, k)
    for row in range(num_slots):
        place = min(int(match[row, 0] + num_tokens[slots[row]] - seen[row]), LONGEST)
        taken = int(match[row, 2]) >> place & 1
        assert int(counts[row]) == int(all_of_them[row]) * taken
        assert int(origins[row]) == (int(match[row, 1]) + place) << COUNT_BITS | int(counts[row])


def test_a_padding_row_copies_nothing(device: torch.device) -> None:
    history = torch.zeros(2, L, dtype=torch.int64, device=device)
    one = torch.ones(1, dtype=torch.int64, device=device)
    uploads = torch.zeros(1, 2 + 10 + MATCH, dtype=torch.int64, device=device)
    _, copied, counts, origins = copy_drafts(uploads, history, one, torch.ones(2, dtype=torch.int64, device=device), 4)
    assert not copied.any() and counts.tolist() == [0] and int(origins) & ((1 << COUNT_BITS) - 1) == 0
