"""Errors and garbled answers, counted so that a fair coin decides whose they are while the arms are equal."""

from __future__ import annotations

BLOCK_S = 10.0
"""Incidents of one arm within so many seconds are one."""


class Incidents:
    """Time blocks in which more keys failed for their first time in one arm than in the other.

    A key counts once: one whose every request fails is one incident however many it sends, so each key that fails
    is an independent fair coin, which is what assigned it. A block counts once: a burst of errors is one
    incident however many keys it hits, and whose it is, is as likely the one arm's as the other's while they are equal
    (the sign test: Dixon and Mood, JASA 1946). Blocks in which as many keys fail in both say nothing.
    """

    def __init__(self) -> None:
        self.candidate = 0
        self.baseline = 0
        self._failed: tuple[set[int], set[int]] = (set(), set())
        self._open: dict[int, list[int]] = {}

    def add(self, *, candidate: bool, key: int, at_s: float) -> None:
        """Notes that a request of `key` failed."""
        side = 0 if candidate else 1
        if key in self._failed[side]:
            return
        self._failed[side].add(key)
        self._open.setdefault(int(at_s // BLOCK_S), [0, 0])[side] += 1

    def settle(self, now_s: float) -> None:
        """Counts the blocks that are over."""
        for block in [block for block in self._open if block < int(now_s // BLOCK_S)]:
            ours, theirs = self._open.pop(block)
            self.candidate += ours > theirs
            self.baseline += theirs > ours
