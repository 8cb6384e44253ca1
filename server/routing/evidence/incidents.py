"""Errors and garbled answers, counted so that a fair coin decides whose they are while the arms are equal."""

from __future__ import annotations

BLOCK_S = 10.0
"""Incidents of one arm within so many seconds are one."""


class Incidents:
    """Time blocks in which a key failed for its first time, in one arm and not in the other.

    A key counts once: one whose every request fails is one incident however many it sends, so each key that fails
    is an independent fair coin, which is what assigned it. A block counts once: a burst of errors is one
    incident however many keys it hits. Blocks in which both arms fail say nothing (McNemar 1947).
    """

    def __init__(self) -> None:
        self.candidate = 0
        self.baseline = 0
        self._failed: tuple[set[int], set[int]] = (set(), set())
        self._open: dict[int, list[bool]] = {}

    def add(self, *, candidate: bool, key: int, at_s: float) -> None:
        """Notes that a request of `key` failed."""
        side = 0 if candidate else 1
        if key in self._failed[side]:
            return
        self._failed[side].add(key)
        self._open.setdefault(int(at_s // BLOCK_S), [False, False])[side] = True

    def settle(self, now_s: float) -> None:
        """Counts the blocks that are over."""
        for block in [block for block in self._open if block < int(now_s // BLOCK_S)]:
            ours, theirs = self._open.pop(block)
            self.candidate += ours and not theirs
            self.baseline += theirs and not ours
