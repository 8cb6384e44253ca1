"""Which generated texts are worth learning from: no loops, no gibberish, nothing twice."""

from __future__ import annotations

import hashlib
import zlib
from collections.abc import Callable, Sequence

import numpy as np
from numpy.typing import NDArray

MAX_PERIOD = 32
"""Loops of up to this many tokens are found."""
LOOP_AGREEMENT = 0.9
"""A text that agrees with itself, shifted by a period, in this share of places is a loop with small changes."""
MIN_LOOP_TOKENS = 12
MIN_BYTES_FOR_RATIO = 256
MOST_COMPRESSED, LEAST_COMPRESSED = 6.0, 1.25
"""zlib makes English prose 2 to 3 times smaller; a listing that repeats itself more, random characters by 1.2."""
PREFIX_TOKENS = 64

Decode = Callable[[Sequence[int]], str]


def is_loop(token_ids: Sequence[int]) -> bool:
    """Whether the last third of a text repeats itself with a period of at most MAX_PERIOD tokens."""
    tail = np.asarray(token_ids[-(len(token_ids) // 3) :] if len(token_ids) >= 3 else [])
    if len(tail) < MIN_LOOP_TOKENS:
        return False
    for period in range(1, min(MAX_PERIOD, len(tail) // 2) + 1):
        if np.mean(tail[period:] == tail[:-period]) >= LOOP_AGREEMENT:
            return True
    return False


def has_extreme_ratio(text: str) -> bool:
    """Whether zlib finds the text far more or far less regular than language is; short texts never are."""
    data = text.encode("utf-8", "replace")
    if len(data) < MIN_BYTES_FOR_RATIO:
        return False
    ratio = len(data) / len(zlib.compress(data, 6))
    return not LEAST_COMPRESSED <= ratio <= MOST_COMPRESSED


class Deduplicator:
    """Remembers texts by their tokens and by how they begin, letters' case and white space apart."""

    def __init__(self, decode: Decode) -> None:
        self._decode = decode
        self._seen: set[bytes] = set()

    def is_new(self, token_ids: NDArray[np.int32], written: NDArray[np.int32]) -> bool:
        """Whether neither the document nor the beginning of what the model wrote in it has been seen; now it has."""
        beginning = " ".join(self._decode(written[:PREFIX_TOKENS].tolist()).lower().split())
        keys = {_digest(b"ids", token_ids.tobytes()), _digest(b"beginning", beginning.encode())}
        new = self._seen.isdisjoint(keys)
        self._seen |= keys
        return new


def _digest(kind: bytes, data: bytes) -> bytes:
    return hashlib.blake2b(data, digest_size=16, person=kind).digest()
