from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from draft_models.ngram import NgramDrafter, lookup
from server.core import SamplingParams
from server.sampling.state import SamplingBatch
from server.spec.types import Carry, SlotState

SAMPLING = SamplingBatch.of([SamplingParams()], 8)


def carry_of(texts: list[list[int]], limits: list[int], num_slots: int = 6) -> Carry:
    """Rows live in slots of descending index, with other rows' rubbish past their ends."""
    width = max(len(text) for text in texts) + 3
    history = torch.full((num_slots, width), 3)
    num_tokens = torch.ones(num_slots, dtype=torch.int64)
    slots = list(range(num_slots - 1, num_slots - 1 - len(texts), -1))
    for slot, text in zip(slots, texts, strict=True):
        history[slot, : len(text)] = torch.tensor(text)
        num_tokens[slot] = len(text)
    return Carry(
        slots=slots,
        slot_ids=torch.tensor(slots),
        state=SlotState(history, num_tokens, torch.ones_like(num_tokens)),
        max_tokens_host=width - 1,
        limits=limits,
        block_tables=torch.zeros(len(texts), 1, dtype=torch.int64),
        blocks=[[0] for _ in texts],
        tokens_host=[len(text) for text in texts],
    )


def brute_force(text: list[int], k: int, low: int, high: int) -> tuple[list[int], int]:
    size = len(text)
    for n in range(min(high, size - 1), low - 1, -1):
        for end in range(size - 2, n - 2, -1):
            if text[end - n + 1 : end + 1] == text[size - n :]:
                copied = list(text)
                for step in range(k):
                    copied.append(copied[end + 1 + step])
                return copied[size:], n
    return [], 0


@given(
    texts=st.lists(st.lists(st.integers(0, 3), min_size=1, max_size=24), min_size=1, max_size=4),
    k=st.integers(1, 9),
    low=st.integers(1, 4),
    extra=st.integers(0, 3),
)
def test_lookup_finds_what_a_brute_force_search_finds(texts: list[list[int]], k: int, low: int, extra: int) -> None:
    carry = carry_of(texts, [k] * len(texts))
    rows = carry.state.history[carry.slot_ids]
    tokens, matched = lookup(rows, carry.state.num_tokens[carry.slot_ids], k, low, low + extra)
    assert tokens.shape == (len(texts), k)
    for row, text in enumerate(texts):
        expected, n = brute_force(text, k, low, low + extra)
        assert matched[row] == n
        if n:
            assert tokens[row].tolist() == expected


def test_the_most_recent_of_equally_long_matches_wins() -> None:
    drafts = NgramDrafter(min_ngram=1, max_ngram=3).propose(carry_of([[1, 2, 5, 1, 2, 6, 1, 2]], [3]), 3, SAMPLING)
    assert drafts.tokens.tolist() == [[6, 1, 2]]
    assert drafts.classes == ["ngram:2"]


def test_a_longer_match_beats_a_more_recent_one() -> None:
    drafts = NgramDrafter(min_ngram=1, max_ngram=3).propose(carry_of([[4, 1, 2, 5, 2, 6, 4, 1, 2]], [1]), 1, SAMPLING)
    assert drafts.tokens.tolist() == [[5]]
    assert drafts.classes == ["ngram:3"]


def test_limits_and_unmatched_rows_bound_the_valid_drafts() -> None:
    drafts = NgramDrafter().propose(carry_of([[1, 2, 1], [1, 2, 3], [1, 1], [7]], [2, 5, 0, 5]), 7, SAMPLING)
    assert drafts.tokens.shape == (4, 5)
    assert drafts.num_valid_host == [2, 0, 0, 0]
    assert drafts.num_valid.tolist() == [2, 0, 0, 0]
    assert drafts.tokens[0, :2].tolist() == [2, 1]
    assert drafts.classes == ["ngram:1", "ngram:0", "ngram:1", "ngram:0"]


def test_masked_drafts_are_ids_of_the_history_never_minus_one() -> None:
    drafts = NgramDrafter().propose(carry_of([[1, 2, 3, 0]], [4]), 4, SAMPLING)
    assert drafts.num_valid_host == [0]
    assert bool((drafts.tokens >= 0).all())


@pytest.mark.parametrize(("k", "limits"), [(0, [4]), (4, [0])])
def test_nothing_is_drafted_without_room(k: int, limits: list[int]) -> None:
    drafts = NgramDrafter().propose(carry_of([[1, 1, 1]], limits), k, SAMPLING)
    assert drafts.tokens.shape == (1, 0)
    assert drafts.num_valid_host == [0]


def test_tokens_past_the_committed_end_are_never_matched() -> None:
    carry = carry_of([[1, 2, 9]], [2])
    carry.state.history[carry.slots[0], 3:] = 9
    assert NgramDrafter().propose(carry, 2, SAMPLING).num_valid_host == [0]


def test_bad_bounds_are_refused() -> None:
    with pytest.raises(ValueError, match="min_ngram: 3"):
        NgramDrafter(min_ngram=3, max_ngram=2)


def test_host_events_are_accepted_and_hold_nothing() -> None:
    drafter = NgramDrafter()
    drafter.admit(0, [1, 2], 1)
    drafter.observe(0, [3])
    drafter.release(0)
    drafter.pause()
    assert drafter.feature_layers == ()
    assert not drafter.has_distribution
