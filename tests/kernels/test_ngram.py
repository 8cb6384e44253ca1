"""The n-gram kernel finds what `draft_models.ngram.lookup` finds."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from draft_models.ngram import lookup
from server.kernels.ngram import ngram_draft, ngram_reference
from tests.kernels.conftest import ON_GPU

L = 9000 if ON_GPU else 90
LONG = [1, 2, 3, 17, L - 1, L] if not ON_GPU else [1, 2, 3, 500, 1025, 8192, L]


def poisoned(num_tokens: list[int], num_words: int, device: torch.device) -> tuple[Tensor, Tensor, Tensor]:
    """Histories of few words (so that they repeat), slots in another order, nonsense behind what is known."""
    known = torch.tensor(num_tokens, device=device)
    history = torch.randint(num_words, (len(num_tokens), L), device=device)
    history[torch.arange(L, device=device) >= known[:, None]] = 10**12
    return history, torch.randperm(len(num_tokens), device=device), known


@pytest.mark.parametrize("num_words", [1, 3, 40, 10**6])
@pytest.mark.parametrize(("k", "min_n", "max_n"), [(1, 1, 1), (5, 1, 4), (8, 2, 3), (15, 3, 5)])
def test_equals_lookup(device: torch.device, num_words: int, k: int, min_n: int, max_n: int) -> None:
    history, slots, num_tokens = poisoned(LONG * 2, num_words, device)
    drafts, matched = ngram_draft(history, slots, num_tokens, k, min_n, max_n)
    expected, expected_n = lookup(history[slots], num_tokens[slots], k, min_n, max_n)
    assert torch.equal(matched, expected_n)
    found = matched > 0
    assert torch.equal(drafts[found], expected[found])
    assert ((drafts >= 0) & (drafts < num_words)).all(), "a draft that no row has"
    for row, slot in enumerate(slots.tolist()):
        tokens, n = ngram_reference(history[slot, : num_tokens[slot]].tolist()[-90:], k, min_n, max_n)
        if num_tokens[slot] <= 90:
            assert n == int(matched[row]) and (not n or tokens == drafts[row].tolist())


def test_limits_say_how_many_count(device: torch.device) -> None:
    history, slots, num_tokens = poisoned([40] * 6, 2, device)
    history[slots[5]] = torch.arange(L, device=device)
    limits = torch.tensor([0, 1, 3, 4, 9, 4], device=device)
    _, matched = ngram_draft(history, slots, num_tokens, 4, 1, 3)
    assert matched.tolist()[:5] == [3] * 5
    _, num_valid = ngram_draft(history, slots, num_tokens, 4, 1, 3, limits)
    assert num_valid.tolist() == [0, 1, 3, 4, 4, 0]


def test_most_recent_match_continues_into_itself(device: torch.device) -> None:
    history = torch.zeros(1, L, dtype=torch.int64, device=device)
    history[0, :8] = torch.tensor([7, 1, 2, 9, 1, 2, 1, 2], device=device)
    one = torch.zeros(1, dtype=torch.int64, device=device)
    drafts, matched = ngram_draft(history, one, one + 8, 5, 1, 2)
    assert matched.tolist() == [2] and drafts.tolist() == [[1, 2, 1, 2, 1]]
