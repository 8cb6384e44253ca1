from __future__ import annotations

import random

from draft_models.recent_outputs import RecentOutputs


def test_the_longest_match_wins_over_more_recent_ones() -> None:
    store = RecentOutputs(4)
    store.add([9, 1, 2, 3, 4, 5])
    store.add([8, 1, 2, 3, 6, 7])
    assert store.follow([0, 9, 1, 2, 3], 2) == ([4, 5], 4)
    assert store.follow([0, 0, 1, 2, 3], 2) == ([6, 7], 3)


def test_the_most_frequent_next_token_wins_among_equal_matches() -> None:
    store = RecentOutputs(4)
    for output in ([1, 2, 3, 4, 5], [1, 2, 3, 4, 6], [1, 2, 3, 7, 7]):
        store.add(output)
    assert store.follow([1, 2, 3], 2) == ([4, 6], 3)


def test_nothing_matches_below_three_tokens() -> None:
    store = RecentOutputs(4)
    store.add([1, 2, 3, 4])
    assert store.follow([2, 3], 2) == ([], 0)
    assert store.follow([5, 2, 3], 2) == ([], 0)


def test_too_short_outputs_are_not_kept() -> None:
    store = RecentOutputs(4)
    store.add([1, 2, 3])
    assert len(store) == 0


def test_the_oldest_output_is_evicted_without_a_trace() -> None:
    store = RecentOutputs(2)
    store.add([1, 2, 3, 4])
    store.add([5, 6, 7, 8])
    store.add([5, 6, 7, 9])
    assert len(store) == 2
    assert store.follow([1, 2, 3], 1) == ([], 0)
    assert store.follow([5, 6, 7], 1) == ([9], 3)
    assert store.num_keys == 1


def test_memory_stays_bounded_and_every_match_refers_to_a_held_output() -> None:
    rng = random.Random(0)
    store = RecentOutputs(3, max_tokens=20)
    for _ in range(200):
        store.add([rng.randrange(3) for _ in range(rng.randrange(60))])
        store.follow([rng.randrange(3) for _ in range(6)], 4)
        assert store.num_keys <= 27
        assert len(store) <= 3
    for _ in range(3):
        store.add([7, 7, 7, 7])
    assert store.num_keys == 1


def test_eviction_spares_the_same_words_of_a_newer_output() -> None:
    store = RecentOutputs(1)
    store.add([1, 2, 3, 4])
    store.add([1, 2, 3, 5])
    assert store.follow([1, 2, 3], 1) == ([5], 3)
