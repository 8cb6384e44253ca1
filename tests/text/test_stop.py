"""Stop strings: any split of the text gives what cutting the whole text gives."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from server.text.stop import StopMatcher


def cut_whole(text: str, stops: list[str]) -> tuple[str, str | None]:
    found = [(text.find(stop), len(stop), stop) for stop in stops if stop in text]
    if not found:
        return text, None
    at, _, stop = min(found)
    return text[:at], stop


def stream(pieces: list[str], stops: list[str]) -> tuple[str, str | None]:
    matcher = StopMatcher(stops)
    out = "".join(matcher.feed(piece) for piece in pieces) + matcher.flush()
    return out, matcher.matched


# Two letters make overlapping, nested and self-overlapping stop strings common.
stop_lists = st.lists(st.text("ab", min_size=1, max_size=5), max_size=6)
piece_lists = st.lists(st.text("abc", max_size=4), max_size=20)


@settings(max_examples=1000, deadline=None)
@given(piece_lists, stop_lists)
def test_any_split_equals_cutting_the_whole_text(pieces: list[str], stops: list[str]) -> None:
    assert stream(pieces, stops) == cut_whole("".join(pieces), stops)


@settings(max_examples=500, deadline=None)
@given(piece_lists, stop_lists)
def test_holds_back_no_more_than_the_longest_possible_beginning(pieces: list[str], stops: list[str]) -> None:
    matcher = StopMatcher(stops)
    fed = emitted = ""
    for piece in pieces:
        fed += piece
        emitted += matcher.feed(piece)
        if any(stop in fed for stop in stops):
            return
        tails = [k for stop in stops for k in range(len(stop)) if k and fed.endswith(stop[:k])]
        assert emitted == fed[: len(fed) - max(tails, default=0)]


def test_without_stops_text_passes_through() -> None:
    matcher = StopMatcher([])
    assert [matcher.feed("a"), matcher.feed("b\n"), matcher.flush()] == ["a", "b\n", ""]
    assert matcher.matched is None


def test_a_false_beginning_is_released() -> None:
    matcher = StopMatcher(["\n\nUser:"])
    assert [matcher.feed(piece) for piece in ("Hi", "\n", "\n", "Us", "e", "d")] == ["Hi", "", "", "", "", "\n\nUsed"]


def test_a_stop_inside_a_longer_candidate_waits_for_the_candidate() -> None:
    assert stream(["ab", "c", "d", "e"], ["abcd", "c"]) == ("", "abcd")
    assert stream(["ab", "c", "x", "e"], ["abcd", "c"]) == ("ab", "c")
    assert stream(["ab", "c"], ["abcd", "c"]) == ("ab", "c")


def test_nothing_comes_after_a_match() -> None:
    matcher = StopMatcher(["END"])
    assert matcher.feed("one END two") == "one "
    assert (matcher.feed("three"), matcher.flush(), matcher.matched) == ("", "", "END")


def test_an_empty_stop_string_is_refused() -> None:
    with pytest.raises(ValueError, match="empty string"):
        StopMatcher(["a", ""])


def test_many_long_stop_strings_cost_little() -> None:
    stops = ["a" * 500 + str(i) for i in range(64)]
    matcher = StopMatcher(stops)
    text = "a" * 20_000
    out = "".join(matcher.feed(char) for char in text) + matcher.flush()
    assert out == text


def test_matchers_of_the_same_strings_share_nothing_that_changes() -> None:
    first, second = StopMatcher(["<end>"]), StopMatcher(["<end>"])
    assert first.feed("a<en") == "a"
    assert second.feed("b") == "b"
    assert (first.feed("d>c"), first.matched) == ("", "<end>")
    assert (second.feed("d>c") + second.flush(), second.matched) == ("d>c", None)
