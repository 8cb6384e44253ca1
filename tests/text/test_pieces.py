"""Encoding piece by piece gives what encoding at once gives."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from server.text import pieces
from server.text.pieces import PieceEncoder, divides_at_special_tokens
from server.text.tokenizer import Tokenizer

BYTE_LEVEL = {"type": "ByteLevel", "add_prefix_space": False}
ADDED = {"special": True, "lstrip": False, "rstrip": False, "single_word": False}


def content(**changes: Any) -> dict[str, Any]:
    return {"added_tokens": [ADDED], "normalizer": None, "pre_tokenizer": BYTE_LEVEL} | changes


@pytest.mark.parametrize(
    ("changes", "divides"),
    [
        ({}, True),
        ({"pre_tokenizer": None}, True),
        ({"pre_tokenizer": {"type": "Sequence", "pretokenizers": [{"type": "Digits"}, BYTE_LEVEL]}}, True),
        ({"pre_tokenizer": {**BYTE_LEVEL, "add_prefix_space": True}}, False),
        ({"pre_tokenizer": {"type": "Sequence", "pretokenizers": [BYTE_LEVEL, {"type": "Metaspace"}]}}, False),
        ({"normalizer": {"type": "NFC"}}, False),
        ({"added_tokens": [{**ADDED, "lstrip": True}]}, False),
        ({"added_tokens": [ADDED, {**ADDED, "special": False}]}, False),
    ],
)
def test_only_where_a_piece_stands_alone(changes: dict[str, Any], divides: bool) -> None:
    assert divides_at_special_tokens(content(**changes)) is divides


@given(words=st.lists(st.sampled_from(["<s>", "</s>", "<unk>", " the", "the ", "\n", "é", "<", "s>", "12 "])))
def test_the_same_tokens_as_at_once(tiny_llama_dir: Path, words: list[str]) -> None:
    text = "".join(words)
    tokenizer = Tokenizer.from_directory(tiny_llama_dir)
    assert tokenizer._pieces is not None
    whole = tokenizer.backend.encode(text, add_special_tokens=False).ids
    for _ in range(2):  # the second time from memory
        assert tokenizer.encode(text, add_special_tokens=False) == whole


def test_the_embedded_models_prompts_are_encoded_in_pieces(embedded_model_dir: Path) -> None:
    tokenizer = Tokenizer.from_directory(embedded_model_dir)
    assert tokenizer._pieces is not None
    text = "<|im_start|>system\nBe brief.<|im_end|>\n<|im_start|>user\n 1234  été<|im_end|>\n<|im_start|>assistant\n"
    assert tokenizer.encode(text, add_special_tokens=False) == tokenizer.backend.encode(text).ids


def _recording(monkeypatch: pytest.MonkeyPatch, max_bytes: int) -> tuple[PieceEncoder, list[str]]:
    monkeypatch.setattr(pieces, "MAX_PIECES_BYTES", max_bytes)
    encoded: list[str] = []

    def encode(piece: str) -> list[int]:
        encoded.append(piece)
        return [len(piece)]

    return PieceEncoder(re.compile("#"), {"#": 99}, encode), encoded


def test_long_pieces_are_not_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pieces, "MAX_PIECE_CHARS", 3)
    encoder, encoded = _recording(monkeypatch, 2**20)
    assert encoder.encode("long#ccc") == encoder.encode("long#ccc") == [4, 99, 3]
    assert encoded == ["long", "ccc", "long"]


def test_what_was_not_used_for_longest_goes_first(monkeypatch: pytest.MonkeyPatch) -> None:
    encoder, encoded = _recording(monkeypatch, 2 * pieces._num_bytes("a", (1,)))
    encoder.encode("a#b#a")
    assert encoded == ["a", "b"]
    encoder.encode("c")  # b goes: a was used after it
    encoder.encode("a")
    assert encoded == ["a", "b", "c"]
    encoder.encode("b")
    assert encoded == ["a", "b", "c", "b"]


def test_memory_is_bounded_by_bytes(monkeypatch: pytest.MonkeyPatch) -> None:
    encoder, _ = _recording(monkeypatch, 100_000)
    for index in range(100):
        encoder.encode(chr(0x4E00 + index) * 10_000)
    kept = sum(pieces._num_bytes(*item) for item in encoder._known.items())
    assert 0 < kept == encoder._num_bytes <= 100_000
