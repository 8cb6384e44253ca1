"""Which bytes a token stands for.

Byte-level BPE and SentencePiece BPE with byte fallback decode token by token: a text is the UTF-8 decoding
of its tokens' bytes. For these two, streaming and log-probabilities' `bytes` are exact. Other decoders look
at neighbours (WordPiece, CTC) and have no bytes of their own.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

ToBytes = Callable[[str], bytes]
_BYTE_TOKEN = re.compile(r"<0x([0-9A-Fa-f]{2})>")


@dataclass(frozen=True, slots=True)
class ByteDecoding:
    """How tokens turn into bytes; `strips_space` says that a text loses one leading space when it is decoded."""

    to_bytes: ToBytes
    strips_space: bool


def byte_decoding(decoder: dict[str, Any] | None) -> ByteDecoding | None:
    """What the `decoder` entry of a `tokenizer.json` stands for; None if tokens have no bytes of their own."""
    if decoder is None:
        return None
    if decoder.get("type") == "ByteLevel":
        return ByteDecoding(_byte_level_bytes, strips_space=False)
    if decoder.get("type") != "Sequence":
        return None
    steps = list(decoder.get("decoders", ()))
    if len(steps) == 1:
        return byte_decoding(steps[0])
    kinds = [step.get("type") for step in steps]
    if kinds not in (["Replace", "ByteFallback", "Fuse"], ["Replace", "ByteFallback", "Fuse", "Strip"]):
        return None
    space = steps[0].get("pattern", {}).get("String")
    if space is None or steps[0].get("content") != " ":
        return None
    if len(steps) == 4 and (steps[3].get("content"), steps[3].get("start"), steps[3].get("stop")) != (" ", 1, 0):
        return None
    return ByteDecoding(lambda token: _byte_fallback_bytes(token, space), strips_space=len(steps) == 4)


def byte_level_alphabet() -> dict[str, int]:
    """GPT-2's printable stand-in of every byte, as character -> byte (radford2019, `bytes_to_unicode`)."""
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [byte for byte in range(256) if byte not in set(printable)]
    return {chr(byte): byte for byte in printable} | {chr(256 + i): byte for i, byte in enumerate(others)}


_ALPHABET = byte_level_alphabet()


def _byte_level_bytes(token: str) -> bytes:
    try:
        return bytes([_ALPHABET[char] for char in token])
    except KeyError:  # an added token whose spelling is not in the alphabet stands for itself
        return token.encode("utf-8", "replace")


def _byte_fallback_bytes(token: str, space: str) -> bytes:
    match = _BYTE_TOKEN.fullmatch(token)
    return bytes([int(match[1], 16)]) if match else token.replace(space, " ").encode("utf-8", "replace")
