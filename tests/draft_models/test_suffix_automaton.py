from __future__ import annotations

from collections import Counter

from hypothesis import given
from hypothesis import strategies as st

from draft_models.suffix_automaton import SuffixAutomaton

TEXTS = st.integers(1, 4).flatmap(lambda size: st.lists(st.integers(0, size - 1), max_size=40))


def longest_repeated_suffix(text: list[int]) -> int:
    size = len(text)
    for length in range(size - 1, 0, -1):
        if any(text[end - length : end] == text[size - length :] for end in range(length, size)):
            return length
    return 0


def most_frequent_next(text: list[int], length: int) -> tuple[int, int, bool]:
    """(token, its last position, strict majority) after the last `length` tokens; ties by recency."""
    tail = text[len(text) - length :]
    places = [end for end in range(length, len(text)) if text[end - length : end] == tail]
    counts = Counter(text[place] for place in places)
    last = {text[place]: place for place in places}
    token = max(counts, key=lambda t: (counts[t], last[t]))
    return token, last[token], 2 * counts[token] > len(places)


@given(TEXTS)
def test_match_and_first_token_equal_brute_force_at_every_prefix(text: list[int]) -> None:
    automaton = SuffixAutomaton(max_chain=1000)
    for size, token in enumerate(text, start=1):
        automaton.extend([token])
        length = longest_repeated_suffix(text[:size])
        found = automaton.follow(5)
        assert automaton.match_length() == found.match_length == length
        assert automaton.num_states <= 2 * size + 1
        assert len(automaton) == size
        if length == 0:
            assert found.tokens == []
        else:
            assert len(found.tokens) == 5
            assert (found.tokens[0], found.position, found.is_majority) == most_frequent_next(text[:size], length)


@given(TEXTS, st.integers(0, 40))
def test_tokens_may_come_in_any_pieces(text: list[int], cut: int) -> None:
    pieces = SuffixAutomaton(text[:cut])
    pieces.extend(text[cut:])
    assert pieces.follow(8) == SuffixAutomaton(text).follow(8)


def test_bounded_chains_leave_the_match_exact() -> None:
    text = [0, 1, 0, 1, 1] * 30
    assert SuffixAutomaton(text, max_chain=2).match_length() == longest_repeated_suffix(text)


def test_frequency_beats_recency_and_recency_breaks_ties() -> None:
    assert SuffixAutomaton([1, 2, 8, 1, 2, 8, 1, 2, 9, 1, 2]).follow(1).tokens == [8]
    assert SuffixAutomaton([1, 2, 8, 1, 2, 9, 1, 2]).follow(1).tokens == [9]


def test_a_loop_is_continued_past_the_end_of_the_text() -> None:
    assert SuffixAutomaton([5, 1, 2, 3, 1, 2, 3, 1]).follow(9).tokens == [2, 3, 1, 2, 3, 1, 2, 3, 1]
    assert SuffixAutomaton([7, 7]).follow(4).tokens == [7, 7, 7, 7]


def test_nothing_follows_without_a_match_or_a_request() -> None:
    assert SuffixAutomaton().follow(3).tokens == []
    assert SuffixAutomaton([1, 2, 3]).follow(3).tokens == []
    assert SuffixAutomaton([1, 1]).follow(0).tokens == []
    assert SuffixAutomaton().match_length() == 0


def test_a_split_state_keeps_the_occurrences_of_both_halves() -> None:
    a, b, c = 1, 2, 3
    text = [7, a, b, 7, a, b, 8, a, b, 9, a, c, 10, a, c, 11, a]
    assert SuffixAutomaton(text).follow(1).tokens == [b]
