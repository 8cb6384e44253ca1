"""Blocks found by what they hold."""

from __future__ import annotations

import pytest

from server.engine.prefix_cache import ROOT, PrefixCache, block_key


def filled(token_ids: list[int], size: int = 4) -> PrefixCache:
    """A cache in which block 10 + i holds the i-th full block of `token_ids`."""
    cache = PrefixCache(size)
    key = ROOT
    for i in range(len(token_ids) // size):
        key = block_key(key, token_ids[i * size : (i + 1) * size])
        assert cache.insert(key, 10 + i)
    return cache


TOKENS = list(range(100, 112))


def test_a_key_stands_for_the_whole_prefix() -> None:
    a, b = [1, 2, 3, 4], [5, 6, 7, 8]
    assert block_key(ROOT, a) == block_key(ROOT, list(a))
    assert block_key(ROOT, a) != block_key(ROOT, b)
    assert block_key(block_key(ROOT, a), b) != block_key(block_key(ROOT, b), b)
    assert block_key(ROOT, [1]) != block_key(ROOT, [256])  # wide ids take part with all their bytes


def test_the_longest_cached_prefix_is_found() -> None:
    cache = filled(TOKENS)
    assert cache.match([*TOKENS, 7], 12)[0] == [10, 11, 12]
    assert cache.match([*TOKENS[:8], 7, 7, 7, 7, 7], 12)[0] == [10, 11]
    assert cache.match([7, *TOKENS], 12) == ([], [])


def test_a_gap_ends_the_match() -> None:
    cache = filled(TOKENS)
    cache.forget(11)
    assert cache.match([*TOKENS, 7], 12)[0] == [10]


@pytest.mark.parametrize(("max_tokens", "num_blocks"), [(0, 0), (3, 0), (4, 1), (7, 1), (11, 2), (12, 3)])
def test_a_match_is_at_most_max_tokens_long(max_tokens: int, num_blocks: int) -> None:
    blocks, keys = filled(TOKENS).match(TOKENS, max_tokens)
    assert len(blocks) == len(keys) == num_blocks


def test_a_block_aligned_prompt_that_is_all_cached_leaves_its_last_block_to_run() -> None:
    blocks, _ = filled(TOKENS).match(TOKENS, len(TOKENS) - 1)
    assert blocks == [10, 11]


def test_keys_of_a_match_continue_the_chain() -> None:
    cache = filled(TOKENS)
    _, keys = cache.match(TOKENS, 12)
    assert keys[2] == block_key(keys[1], TOKENS[8:12])


def test_the_older_block_stays_and_a_block_has_one_key() -> None:
    cache = PrefixCache(4)
    first, second = block_key(ROOT, [1, 2, 3, 4]), block_key(ROOT, [5, 6, 7, 8])
    assert cache.insert(first, 3)
    assert not cache.insert(first, 4)
    assert not cache.insert(second, 3)
    assert cache.match([1, 2, 3, 4], 4)[0] == [3]
    assert len(cache) == 1


def test_what_is_forgotten_may_enter_again() -> None:
    cache = filled(TOKENS)
    cache.forget(10)
    assert cache.match(TOKENS, 12) == ([], [])
    assert cache.insert(block_key(ROOT, TOKENS[:4]), 20)
    assert cache.match(TOKENS, 12)[0] == [20, 11, 12]


def test_a_disabled_cache_holds_nothing() -> None:
    cache = PrefixCache(4, enabled=False)
    assert not cache.insert(block_key(ROOT, [1, 2, 3, 4]), 1)
    assert cache.match([1, 2, 3, 4], 4) == ([], [])
    assert len(cache) == 0
