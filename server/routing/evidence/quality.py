"""Whether an answer reads like text at all, from the text alone."""

from __future__ import annotations

import re
import zlib
from dataclasses import dataclass

MIN_CHARS = 80
"""Shorter answers say too little for a compression ratio."""
MIN_WORD_TRIPLES, MIN_CHAR_TRIPLES = 10, 24
"""Fewer say nothing of repetition."""
MAX_COMPRESSION = 6.0
MIN_DISTINCT = 0.2
MAX_BROKEN = 0.02
MAX_MIXED = 0.2

_WORD = re.compile(r"\w+")
_BROKEN = re.compile(r"[\ufffd\x00-\x08\x0b\x0c\x0e-\x1f]|<unk>")
_LATIN = re.compile(r"[A-Za-z\u00c0-\u024f]")
_OTHER = re.compile(r"[\u0370-\u1fff\u3040-\ud7ff]")


@dataclass(frozen=True, slots=True)
class Quality:
    """`compression_ratio`: bytes a compressed byte (None: too short). `distinct`: different among all triples, of words
    in an answer that is long enough for a compression ratio, of characters in a shorter one.

    `broken`: replacement and control characters and `<unk>` a character. `mixed`: words of Latin and other letters.
    """

    compression_ratio: float | None
    distinct: float
    broken: float
    mixed: float

    @property
    def garbled(self) -> bool:
        """Whether one of them is beyond what readable text has."""
        repeats = self.distinct < MIN_DISTINCT or (self.compression_ratio or 0.0) > MAX_COMPRESSION
        return repeats or self.broken > MAX_BROKEN or self.mixed > MAX_MIXED


def read(text: str) -> Quality:
    """The proxies of one answer: some tens of microseconds a thousand characters."""
    words = _WORD.findall(text)
    raw = text.encode("utf-8", "replace")
    if len(text) >= MIN_CHARS:
        ratio, pieces, fewest = len(raw) / len(zlib.compress(raw, 1)), words, MIN_WORD_TRIPLES
    else:
        ratio, pieces, fewest = None, list(text), MIN_CHAR_TRIPLES
    triples = [tuple(pieces[i : i + 3]) for i in range(len(pieces) - 2)]
    mixed = sum(1 for word in words if _LATIN.search(word) and _OTHER.search(word))
    return Quality(
        ratio,
        len(set(triples)) / len(triples) if len(triples) >= fewest else 1.0,
        len(_BROKEN.findall(text)) / max(len(text), 1),
        mixed / len(words) if len(words) >= 10 else 0.0,
    )
