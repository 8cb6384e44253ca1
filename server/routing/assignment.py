"""Which arm a key belongs to: a pure function of salt, weights and key, the same in every process and after restarts.

Weighted rendezvous hashing: every arm draws a number for the key, and the largest of `-weight / ln(number)` wins, so
that an arm's share is its weight's share (Schindelhauer and Schomaker, "Weighted distributed hash tables", SPAA 2005).
A key moves only from an arm whose weight fell, relative to the others', to one whose weight rose: while an arm's weight
goes from 1 to 5 percent, 4 percent of the keys move.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from hashlib import blake2b

_RANGE = float(1 << 64)


@dataclass(frozen=True, slots=True)
class Assignment:
    """`weights` by arm's name, 0 or more, at least one above 0; only their ratios count.

    Another `salt` is another, independent split. ValueError for weights that are not such.
    """

    weights: Mapping[str, float]
    salt: str = ""
    _drawing: tuple[tuple[bytes, float], ...] = field(init=False, repr=False, compare=False)
    _names: tuple[str, ...] = field(init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        for name, weight in self.weights.items():
            if not (math.isfinite(weight) and weight >= 0):
                raise ValueError(f"weight of {name!r}: {weight!r} is not valid; use 0 or more")
        names = tuple(sorted(name for name, weight in self.weights.items() if weight > 0))
        if not names:
            raise ValueError("weights: all are 0; at least one arm needs traffic")
        drawing = tuple((_frame(self.salt) + _frame(name), float(self.weights[name])) for name in names)
        object.__setattr__(self, "_names", names)
        object.__setattr__(self, "_drawing", drawing)

    def __call__(self, key: str) -> str:
        """The name of the arm that `key` belongs to."""
        if len(self._names) == 1:
            return self._names[0]
        asked = key.encode("utf-8", "surrogatepass")
        best, chosen = -1.0, 0
        for index, (prefix, weight) in enumerate(self._drawing):
            number = int.from_bytes(blake2b(prefix + asked, digest_size=8).digest(), "big")
            score = -weight / math.log((number + 0.5) / _RANGE) if number < _MAX else math.inf
            if score > best:
                best, chosen = score, index
        return self._names[chosen]


_MAX = (1 << 64) - (1 << 11)
"""From here on (number + 0.5) / 2**64 rounds to 1, whose logarithm is 0."""


def _frame(text: str) -> bytes:
    """With its length before it: two parts cannot be taken for two others."""
    data = text.encode()
    return len(data).to_bytes(4, "big") + data
