"""Tokens to visible text: the same for every grouping, tokens after a stop string do not count."""

from __future__ import annotations

from hypothesis import given, settings
from hypothesis import strategies as st

from server.text.stream import TextStream
from server.text.tokenizer import Tokenizer


@settings(max_examples=300, deadline=None)
@given(
    text=st.text("ab€helo", max_size=24),
    stops=st.lists(st.text("ab€", min_size=1, max_size=3), max_size=3),
    size=st.integers(1, 6),
)
def test_grouping_makes_no_difference(byte_level: Tokenizer, text: str, stops: list[str], size: int) -> None:
    ids = byte_level.encode(text, add_special_tokens=False)

    def run(group: int) -> tuple[str, int, str | None]:
        stream = TextStream(byte_level, stops)
        deltas = [stream.feed(ids[i : i + group]) for i in range(0, len(ids), group)]
        deltas.append(stream.flush())
        return "".join(d.text for d in deltas), sum(d.num_tokens for d in deltas), deltas[-1].stop

    assert run(size) == run(1)
    cuts = [text.find(stop) for stop in stops if stop in text]
    assert run(size)[0] == text[: min(cuts, default=len(text))]


def test_tokens_up_to_the_stop_string_count(byte_level: Tokenizer) -> None:
    stream = TextStream(byte_level, ["bc"])
    delta = stream.feed(byte_level.encode("abcde", add_special_tokens=False))
    assert (delta.text, delta.num_tokens, delta.stop) == ("a", 3, "bc")
    assert stream.stopped
    assert stream.feed([1]).num_tokens == 0
    assert stream.flush().stop == "bc"


def test_the_end_releases_what_was_held_back(byte_level: Tokenizer) -> None:
    stream = TextStream(byte_level, ["bcd"])
    ids = byte_level.encode("abc€", add_special_tokens=False)
    assert stream.feed(ids[:3]).text == "a"
    assert stream.feed(ids[3:-1]).text == ""
    delta = stream.flush()
    assert (delta.text, delta.stop) == ("bc\ufffd", None)


def test_a_stop_string_found_only_at_the_end(byte_level: Tokenizer) -> None:
    stream = TextStream(byte_level, ["abcd", "c"])
    assert stream.feed(byte_level.encode("abc", add_special_tokens=False)).text == ""
    delta = stream.flush()
    assert (delta.text, delta.stop) == ("ab", "c")
