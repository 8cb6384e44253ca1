"""Encodes a text piece by piece between special tokens, and remembers the pieces.

A chat prompt begins with the same system prompt and the same earlier turns again and again: they are encoded once.
"""

from __future__ import annotations

import re
import sys
from collections import OrderedDict
from collections.abc import Callable, Mapping
from threading import Lock
from typing import Any

MAX_PIECES_BYTES = 16 * 2**20
MAX_PIECE_CHARS = 32_768
"""Pieces kept in all and the longest of them; what was not used for longest goes first."""

_ENTRY_BYTES = 128

Content = Mapping[str, Any]
"""A `tokenizer.json`."""


def divides_at_special_tokens(content: Content) -> bool:
    """Whether the pieces of a text between special tokens are encoded as if each stood alone.

    So it is where nothing is normalised and no rule looks at what is around a piece, as in byte-level BPE.
    """
    plain = all(
        token["special"] and not (token["lstrip"] or token["rstrip"] or token["single_word"])
        for token in content["added_tokens"]
    )
    return plain and content["normalizer"] is None and _is_local(content["pre_tokenizer"])


def _is_local(pre_tokenizer: Content | None) -> bool:
    """Whether a pre-tokenizer treats a piece alike wherever it stands."""
    if pre_tokenizer is None:
        return True
    if pre_tokenizer["type"] == "Sequence":
        return all(map(_is_local, pre_tokenizer["pretokenizers"]))
    return pre_tokenizer["type"] in ("Digits", "Split") or (
        pre_tokenizer["type"] == "ByteLevel" and not pre_tokenizer["add_prefix_space"]
    )


class PieceEncoder:
    """`special` finds special tokens, the longest first; `ids` are theirs. Thread-safe."""

    def __init__(self, special: re.Pattern[str], ids: Mapping[str, int], encode: Callable[[str], list[int]]) -> None:
        self._special = special
        self._ids = ids
        self._encode = encode
        self._known: OrderedDict[str, tuple[int, ...]] = OrderedDict()
        self._num_bytes = 0
        self._lock = Lock()

    def encode(self, text: str) -> list[int]:
        """The tokens of `text`, spellings of special tokens being those."""
        ids: list[int] = []
        at = 0
        for match in self._special.finditer(text):
            if match.start() > at:
                ids += self._piece(text[at : match.start()])
            ids.append(self._ids[match[0]])
            at = match.end()
        if at < len(text):
            ids += self._piece(text[at:])
        return ids

    def _piece(self, piece: str) -> tuple[int, ...]:
        with self._lock:
            known = self._known.get(piece)
            if known is not None:
                self._known.move_to_end(piece)
                return known
        found = tuple(self._encode(piece))
        if len(piece) <= MAX_PIECE_CHARS:
            with self._lock:
                self._keep(piece, found)
        return found

    def _keep(self, piece: str, ids: tuple[int, ...]) -> None:
        if piece in self._known:  # another thread was faster
            return
        self._known[piece] = ids
        self._num_bytes += _num_bytes(piece, ids)
        while self._num_bytes > MAX_PIECES_BYTES:
            self._num_bytes -= _num_bytes(*self._known.popitem(last=False))


def _num_bytes(piece: str, ids: tuple[int, ...]) -> int:
    """What one piece takes: text, tokens (each a reference and a number of its own) and the entry itself."""
    return sys.getsizeof(piece) + sys.getsizeof(ids) + 32 * len(ids) + _ENTRY_BYTES
