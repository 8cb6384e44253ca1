from __future__ import annotations

import random
import string

import numpy as np
import pytest

from optimize.distill.filters import Deduplicator, has_extreme_ratio, is_loop

WORDS_OF_PROSE = ["the", "a", "cat", "house", "ran", "slowly", "because", "rain", "fell", "over", "hills"]
WORDS = list(range(100, 160))


@pytest.mark.parametrize("period", [1, 3, 17, 32])
def test_a_text_that_ends_in_a_loop(period: int) -> None:
    loop = random.Random(period).sample(range(1000), period)
    assert is_loop(WORDS + loop * (240 // period))
    assert is_loop(WORDS + (loop * (240 // period + 1))[: 240 + period // 2])


def test_texts_that_do_not_loop() -> None:
    assert not is_loop(WORDS)
    assert not is_loop([7] * 20 + WORDS), "a loop that was left again"
    assert not is_loop(random.Random(0).choices(range(40), k=300))
    assert not is_loop([5, 5, 5]) and not is_loop([]), "too short to tell"
    assert not is_loop(WORDS + random.Random(1).sample(range(1000), 40) * 6), "a period longer than is looked for"


def test_a_loop_with_a_counter_is_a_loop() -> None:
    lines = [[10, 11, 12, 13, 14, 15, 16, 17, 18, 200 + i, 19] for i in range(20)]
    assert is_loop([t for line in lines for t in line])


def test_compression() -> None:
    prose = " ".join(random.Random(3).choices(WORDS_OF_PROSE, k=90))
    assert not has_extreme_ratio(prose)
    assert has_extreme_ratio("yes and no " * 60)
    noise = "".join(random.Random(5).choices(string.printable, k=800))
    assert has_extreme_ratio(noise)
    assert not has_extreme_ratio("a" * 100), "too short to tell"


def test_the_same_text_twice_and_texts_that_begin_alike() -> None:
    seen = Deduplicator(lambda ids: " ".join("Aa"[i % 2] + str(i // 2) for i in ids))

    def new(ids: list[int], written: list[int]) -> bool:
        return seen.is_new(np.array(ids, np.int32), np.array(written, np.int32))

    beginning = list(range(0, 128, 2))
    assert new([1, *beginning], beginning)
    assert not new([1, *beginning], beginning)
    assert not new([2, *beginning, 9], [*beginning, 9]), "the same first 64 tokens"
    assert not new([3, *beginning], [i + 1 for i in beginning]), "upper and lower case are alike"
    assert new([4, *beginning], [*beginning[:63], 999])
