"""Incremental decoding: pieces join to the whole, characters are never broken, cost per token is constant."""

from __future__ import annotations

import time

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from server.text.detokenizer import Detokenizer
from server.text.tokenizer import Tokenizer

KINDS = ["byte_level", "byte_fallback", "byte_fallback_unstripped", "word_piece"]


@pytest.fixture(params=KINDS, scope="module")
def any_tokenizer(request: pytest.FixtureRequest) -> Tokenizer:
    tokenizer: Tokenizer = request.getfixturevalue(request.param)
    return tokenizer


def pieces_of(tokenizer: Tokenizer, groups: list[list[int]], skip: bool) -> list[str]:
    detokenizer = Detokenizer(tokenizer, skip_special_tokens=skip)
    pieces = [piece for group in groups for piece in detokenizer.feed(group)]
    return [*pieces, detokenizer.flush()]


@settings(max_examples=300, deadline=None)
@given(groups=st.lists(st.lists(st.integers(0, 269), max_size=5), max_size=12), skip=st.booleans())
def test_pieces_join_to_the_whole(any_tokenizer: Tokenizer, groups: list[list[int]], skip: bool) -> None:
    ids = [i for group in groups for i in group]
    pieces = pieces_of(any_tokenizer, groups, skip)
    assert len(pieces) == len(ids) + 1
    assert "".join(pieces) == any_tokenizer.decode(ids, skip_special_tokens=skip)


@settings(max_examples=200, deadline=None)
@given(text=st.text(st.sampled_from("hi é€😀hello"), max_size=20), size=st.integers(1, 7))
def test_characters_are_never_broken(byte_level: Tokenizer, text: str, size: int) -> None:
    ids = byte_level.encode(text, add_special_tokens=False)
    groups = [ids[i : i + size] for i in range(0, len(ids), size)]
    pieces = pieces_of(byte_level, groups, True)
    assert "".join(pieces) == text
    assert all("\ufffd" not in piece for piece in pieces)


@settings(max_examples=200, deadline=None)
@given(text=st.text("hi é€😀", max_size=20), size=st.integers(1, 7))
def test_characters_are_never_broken_where_the_library_decodes(odd_decoder: Tokenizer, text: str, size: int) -> None:
    assert odd_decoder.bytes_decoding is None
    ids = odd_decoder.encode(text, add_special_tokens=False)
    pieces = pieces_of(odd_decoder, [ids[i : i + size] for i in range(0, len(ids), size)], True)
    assert "".join(pieces) == text
    assert all("\ufffd" not in piece for piece in pieces)


def test_what_stays_broken_is_given_up_where_the_library_decodes(odd_decoder: Tokenizer) -> None:
    first = odd_decoder.encode("€", add_special_tokens=False)[0]
    pieces = Detokenizer(odd_decoder).feed([first] * 20)
    assert pieces[:7] == [""] * 7 and pieces[7] == "\ufffd" * 8
    assert Detokenizer(odd_decoder).feed(odd_decoder.encode("hello", add_special_tokens=False)) == ["HELLO"]


def test_a_character_belongs_to_the_token_that_completes_it(byte_level: Tokenizer) -> None:
    ids = byte_level.encode("a€b", add_special_tokens=False)
    assert Detokenizer(byte_level).feed(ids) == ["a", "", "", "€", "b"]


def test_an_incomplete_character_at_the_end_is_replaced(byte_level: Tokenizer) -> None:
    detokenizer = Detokenizer(byte_level)
    assert detokenizer.feed(byte_level.encode("a€", add_special_tokens=False)[:-1]) == ["a", "", ""]
    assert detokenizer.flush() == "\ufffd"
    assert detokenizer.flush() == ""


def test_special_tokens_are_shown_where_wanted(byte_level: Tokenizer) -> None:
    ids = byte_level.encode("he<|im_end|>", add_special_tokens=False)
    assert Detokenizer(byte_level).feed(ids) == ["he", ""]
    assert Detokenizer(byte_level, skip_special_tokens=False).feed(ids) == ["he", "<|im_end|>"]


def test_a_special_token_inside_a_character_leaves_it_whole(byte_level: Tokenizer) -> None:
    first, second, third = byte_level.encode("€", add_special_tokens=False)
    end = next(iter(byte_level.special_ids))
    assert Detokenizer(byte_level).feed([first, end, second, third]) == ["", "", "", "€"]


def test_only_the_first_space_of_a_text_is_stripped(byte_fallback: Tokenizer) -> None:
    hi = byte_fallback.encode("hi", add_special_tokens=False)
    start = [1]
    assert Detokenizer(byte_fallback).feed([*start, *hi, *hi]) == ["", "hi", " hi"]
    assert Detokenizer(byte_fallback, skip_special_tokens=False).feed([*start, *hi]) == ["<s>", " hi"]


def test_cost_per_token_is_constant(any_tokenizer: Tokenizer) -> None:
    ids = [i for i in range(3, 9) if i not in any_tokenizer.special_ids]

    def cost(num_tokens: int) -> float:
        detokenizer = Detokenizer(any_tokenizer)
        start = time.perf_counter()
        for i in range(num_tokens):
            detokenizer.feed((ids[i % len(ids)],))
        return time.perf_counter() - start

    cost(100)
    small, large = min(cost(500) for _ in range(3)), min(cost(8000) for _ in range(3))
    assert large < 16 * small * 5  # quadratic would be 256 times


def test_smollm2_streams_what_it_decodes(smollm2: Tokenizer) -> None:
    text = "Héllo 😀, 123\n\n```py\nprint('ß')\n```\t漢字 ᠮᠣᠩᠭᠣᠯ"
    ids = smollm2.encode(text, add_special_tokens=False)
    detokenizer = Detokenizer(smollm2)
    assert "".join([*detokenizer.feed(ids), detokenizer.flush()]) == text
