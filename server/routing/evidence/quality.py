"""Whether an answer reads like text at all, from the text alone."""

from __future__ import annotations

import re
import zlib
from dataclasses import dataclass

MIN_CHARS = 80
"""Shorter answers say too little: they have no compression ratio, and only replacement characters count."""
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
    """`compression_ratio`: bytes a compressed byte (None: too short). `distinct`: different among all word triples.

    `broken`: replacement and control characters and `<unk>` a character. `mixed`: words of Latin and other letters.
    """

    compression_ratio: float | None
    distinct: float
    broken: float
    mixed: float

    @property
    def garbled(self) -> bool:
        """Whether one of them is beyond what readable text has."""
        repeats = self.compression_ratio is not None and (
            self.compression_ratio > MAX_COMPRESSION or self.distinct < MIN_DISTINCT
        )
        return repeats or self.broken > MAX_BROKEN or self.mixed > MAX_MIXED


def read(text: str) -> Quality:
    """The proxies of one answer: some tens of microseconds a thousand characters."""
    words = _WORD.findall(text)
    triples = [tuple(words[i : i + 3]) for i in range(len(words) - 2)]
    raw = text.encode("utf-8", "replace")
    ratio = len(raw) / len(zlib.compress(raw, 1)) if len(text) >= MIN_CHARS else None
    mixed = sum(1 for word in words if _LATIN.search(word) and _OTHER.search(word))
    return Quality(
        ratio,
        len(set(triples)) / len(triples) if len(triples) >= 10 else 1.0,
        len(_BROKEN.findall(text)) / max(len(text), 1),
        mixed / len(words) if len(words) >= 10 else 0.0,
    )
