"""Which decoders have tokens with bytes of their own."""

from __future__ import annotations

from typing import Any

import pytest
from tokenizers.pre_tokenizers import ByteLevel

from server.text.token_bytes import byte_decoding, byte_level_alphabet

REPLACE = {"type": "Replace", "pattern": {"String": "▁"}, "content": " "}
STRIP = {"type": "Strip", "content": " ", "start": 1, "stop": 0}
MIDDLE = [{"type": "ByteFallback"}, {"type": "Fuse"}]


def test_the_alphabet_is_gpt2s() -> None:
    alphabet = byte_level_alphabet()
    assert sorted(alphabet) == sorted(ByteLevel.alphabet())
    assert sorted(alphabet.values()) == list(range(256))
    assert (alphabet["Ġ"], alphabet["Ċ"], alphabet["a"]) == (0x20, 0x0A, 0x61)


@pytest.mark.parametrize(
    ("decoder", "strips"),
    [
        ({"type": "ByteLevel"}, False),
        ({"type": "Sequence", "decoders": [{"type": "ByteLevel"}]}, False),
        ({"type": "Sequence", "decoders": [REPLACE, *MIDDLE]}, False),
        ({"type": "Sequence", "decoders": [REPLACE, *MIDDLE, STRIP]}, True),
    ],
)
def test_known_decoders(decoder: dict[str, Any], strips: bool) -> None:
    decoding = byte_decoding(decoder)
    assert decoding is not None and decoding.strips_space is strips


@pytest.mark.parametrize(
    "decoder",
    [
        None,
        {"type": "WordPiece"},
        {"type": "Sequence", "decoders": [{"type": "Fuse"}]},
        {"type": "Sequence", "decoders": [REPLACE, {"type": "Fuse"}]},
        {"type": "Sequence", "decoders": [REPLACE | {"pattern": {"Regex": "▁"}}, *MIDDLE]},
        {"type": "Sequence", "decoders": [REPLACE | {"content": "_"}, *MIDDLE]},
        {"type": "Sequence", "decoders": [REPLACE, *MIDDLE, STRIP | {"stop": 1}]},
    ],
)
def test_other_decoders_are_left_to_the_library(decoder: dict[str, Any] | None) -> None:
    assert byte_decoding(decoder) is None


def test_byte_fallback_tokens() -> None:
    decoding = byte_decoding({"type": "Sequence", "decoders": [REPLACE, *MIDDLE]})
    assert decoding is not None
    assert [decoding.to_bytes(t) for t in ("<0xE2>", "▁hi▁", "<0xE2", "é")] == [b"\xe2", b" hi ", b"<0xE2", b"\xc3\xa9"]


def test_an_added_token_outside_the_alphabet_stands_for_itself() -> None:
    decoding = byte_decoding({"type": "ByteLevel"})
    assert decoding is not None
    assert decoding.to_bytes("<tool call>") == b"<tool call>"
    assert decoding.to_bytes("Ġhe") == b" he"
