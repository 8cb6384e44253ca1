"""The alignment kernels drop from a continuation what was emitted since, count what is left of it, and take what was
looked up where the text went another way."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from server.kernels.align import COUNT_BITS, LONGEST, MATCH, align_drafts, align_reference, copy_drafts, copy_reference

L = 64
LOOKED_UP = 50
"""What was looked up is this and more; tokens of the text are less."""


def steps(k: int, device: torch.device) -> tuple[Tensor, Tensor, Tensor, Tensor, tuple[Tensor, Tensor]]:
    """Predictions of every kind (right, wrong, short, none) and lookups with and without a match."""
    num_slots, width = 160, 2 * (k + 1)
    history = torch.randint(2, (num_slots, L), device=device)
    num_tokens = torch.randint(1, L - k, (num_slots,), device=device)
    slots = torch.randperm(num_slots, device=device)
    unseen = torch.randint(0, width + 2, (2, num_slots), device=device).amin(0)
    seen = (num_tokens[slots] - unseen).clamp(min=0)
    predicted = torch.randint(2, (num_slots, width), device=device)
    true = history[slots[:, None], (seen[:, None] + torch.arange(width, device=device)).clamp(max=L - 1)]
    predicted = torch.where(torch.rand(num_slots, 1, device=device) < 0.5, true, predicted)
    length = torch.randint(0, width + 1, (num_slots, 1), device=device)
    predicted[torch.arange(width, device=device) >= length] = -1
    limits = torch.randint(0, k + 1, (num_slots,), device=device)
    matched = torch.tensor([0, 0, 0, 1, 2, 4, 9, 13], device=device)[torch.randint(8, (num_slots,), device=device)]
    lookup = torch.randint(LOOKED_UP, LOOKED_UP + 2, (num_slots, k), device=device), matched
    least = torch.randint(0, 6, (num_slots,), device=device)
    return torch.cat([seen[:, None], limits[:, None], least[:, None], predicted], 1), history, slots, num_tokens, lookup


def by_hand(
    line: list[int], known: list[int], looked_up: list[int], matched: int, least: int | None = None
) -> tuple[list[int], bool]:
    """Drafts of one row, and whether they are those of the lookup."""
    seen, limit, own_least, *predicted = line
    least = own_least if least is None else least
    if -1 in predicted:
        predicted = predicted[: predicted.index(-1)]
    unseen = known[seen:]
    rest = predicted[len(unseen) :]
    fits = predicted[: len(unseen)] == unseen and bool(rest)
    takes = not fits and matched > 0 and (matched >= least or not rest)
    return (looked_up if takes else rest)[: min(limit, len(looked_up))], not fits


@pytest.mark.parametrize("k", [1, 3, 4, 7])
def test_drafts_are_what_is_left_or_what_was_looked_up(device: torch.device, k: int) -> None:
    uploads, history, slots, num_tokens, lookup = steps(k, device)
    drafts, num_valid = align_drafts(uploads, history, slots, num_tokens, lookup)
    expected, expected_valid = align_reference(uploads, history, slots, num_tokens, lookup)
    assert drafts.dtype == num_valid.dtype == torch.int64
    assert torch.equal(num_valid, expected_valid)
    counts = torch.arange(k, device=device) < num_valid[:, None]
    assert torch.equal(drafts[counts], expected[counts])
    assert ((drafts >= 0) & (drafts < LOOKED_UP + 2)).all() and (expected >= 0).all()
    kinds = set()
    for row, slot in enumerate(slots.tolist()):
        known = history[slot, : num_tokens[slot]].tolist()
        mine, falls = by_hand(uploads[row].tolist(), known, lookup[0][row].tolist(), int(lookup[1][row]))
        assert drafts[row, : num_valid[row]].tolist() == mine
        kinds.add((falls, int(lookup[1][row]) > 0, bool(mine)))
    assert len(kinds) == 8, "every case occurs"


def test_a_padding_row_gets_nothing(device: torch.device) -> None:
    history = torch.zeros(2, L, dtype=torch.int64, device=device)
    one = torch.ones(1, dtype=torch.int64, device=device)
    uploads = torch.zeros(1, 3 + 10, dtype=torch.int64, device=device)
    for matched in (one, one * 0):
        found = torch.zeros(1, 4, dtype=torch.int64, device=device), matched
        drafts, num_valid = align_drafts(uploads, history, one, torch.ones_like(history[:, 0]), found)
        assert num_valid.tolist() == [0] and drafts.tolist() == [[0, 0, 0, 0]]


@pytest.mark.parametrize("k", [1, 3, 7])
def test_copies_where_the_match_is_worth_it_by_now(device: torch.device, k: int) -> None:
    lines, history, slots, num_tokens, lookup = steps(k, device)
    num_rows = len(slots)
    match = torch.stack(
        [
            torch.randint(0, 14, (num_rows,), device=device),
            10 * torch.randint(0, 8, (num_rows,), device=device),
            torch.randint(-1, 1 << 10, (num_rows,), device=device),
            torch.full((num_rows,), 80, device=device),
            torch.randint(-1, 1 << 10, (num_rows,), device=device),
        ],
        1,
    )
    assert match.shape[1] == MATCH
    uploads = torch.cat([lines, match], 1)
    found = copy_drafts(uploads, history, slots, num_tokens, lookup)
    expected = copy_reference(uploads, history, slots, num_tokens, lookup)
    for mine, theirs in zip(found[1:], expected[1:], strict=True):
        assert mine.dtype == theirs.dtype and torch.equal(mine, theirs)
    drafts, copied, counts, origins = found
    assert torch.equal(drafts[copied], expected[0][copied]) and ((drafts >= 0) & (drafts < LOOKED_UP + 2)).all()
    told = set()
    for row, slot in enumerate(slots.tolist()):
        known, n = history[slot, : num_tokens[slot]].tolist(), int(lookup[1][row])
        tokens, falls = by_hand(lines[row].tolist(), known, lookup[0][row].tolist(), n, 1)
        place = min(n if falls else int(match[row, 0]) + len(known) - int(lines[row, 0]), LONGEST)
        family, worth = match[row, 3 if falls else 1 :].tolist()[:2]
        tokens = tokens if worth >> place & 1 and not (falls and n == 0) else []
        assert drafts[row, : counts[row]].tolist() == tokens
        assert int(origins[row]) == (family + place) << COUNT_BITS | len(tokens)
        told.add((falls, bool(tokens)))
    assert len(told) == 4, "every case occurs"


def test_a_padding_row_copies_nothing(device: torch.device) -> None:
    history = torch.zeros(2, L, dtype=torch.int64, device=device)
    one = torch.ones(1, dtype=torch.int64, device=device)
    uploads = torch.zeros(1, 3 + 10 + MATCH, dtype=torch.int64, device=device)
    found = torch.zeros(1, 4, dtype=torch.int64, device=device), one
    _, copied, counts, origins = copy_drafts(uploads, history, one, torch.ones_like(history[:, 0]), found)
    assert not copied.any() and counts.tolist() == [0] and int(origins) & ((1 << COUNT_BITS) - 1) == 0
