"""The KV pool's blocks: reference counts, and which free block to hand out next. Pure bookkeeping.

    free, blank   ->  allocate  ->  in use (refs >= 1)  ->  release  ->  free, blank
                                         |                                ^
                                     keep(key)                        evicted: reused while free
                                         v                                |
                                  in use, kept     ->  release  ->  free, kept (a prefix hit revives it)

Block 0 is never handed out: padding tokens write there. A mark beside a block's content says that the drafter's keys
and values of it are there too; it goes with the content.
"""

from __future__ import annotations

import re
from collections.abc import Callable

_BLANK_RUN = re.compile(rb"\x01+")


class OutOfBlocksError(RuntimeError):
    """No free block is left; the caller preempts or waits."""


class BlockPool:
    """`num_blocks` blocks including the null block. `on_evict` hears of a kept block whose content is given up."""

    def __init__(self, num_blocks: int, on_evict: Callable[[int], None] | None = None) -> None:
        self.num_blocks = num_blocks
        self._refs = [0] * num_blocks
        self._refs[0] = 1
        self._free: dict[int, None] = dict.fromkeys(range(1, num_blocks))  # oldest first
        self._blank = bytearray(b"\x00" + b"\x01" * (num_blocks - 1))  # free and holding nothing worth keeping
        self._kept: set[int] = set()
        self._drafted = bytearray(num_blocks)
        self._on_evict = on_evict

    @property
    def num_free(self) -> int:
        """Blocks that `allocate` could hand out, those with kept content included."""
        return len(self._free)

    @property
    def num_used(self) -> int:
        return self.num_blocks - 1 - len(self._free)

    def allocate(self, after: int | None = None) -> int:
        """A free block with one reference. Prefers the neighbour of `after`, so that sequences lie in one piece.

        A new sequence (`after` None) starts in the middle of the longest blank run: room to grow beside others.
        Kept content is evicted only when nothing blank is left, least recently released first.
        """
        if not self._free:
            raise OutOfBlocksError("no free KV block")
        block = self._choose(after)
        del self._free[block]
        self._blank[block] = 0
        self._refs[block] = 1
        self._drafted[block] = 0
        if block in self._kept:
            self._kept.discard(block)
            if self._on_evict is not None:
                self._on_evict(block)
        return block

    def _choose(self, after: int | None) -> int:
        if after is not None and after + 1 < self.num_blocks and self._blank[after + 1]:
            return after + 1
        runs = [m.span() for m in _BLANK_RUN.finditer(self._blank)]
        if not runs:
            return next(iter(self._free))
        start, end = max(runs, key=lambda span: span[1] - span[0])
        return start if end == self.num_blocks and start == 1 else start + (end - start) // 2

    def acquire(self, block: int) -> None:
        """One more reference to a block that is in use or kept (a prefix hit)."""
        if self._refs[block] == 0:
            del self._free[block]
            self._blank[block] = 0
        self._refs[block] += 1

    def release(self, block: int) -> None:
        """One reference less; at none the block is free, its kept content still findable until it is reused."""
        refs = self._refs[block] - 1
        if refs < 0 or block == 0:
            raise AssertionError(f"block {block} released more often than acquired")
        self._refs[block] = refs
        if refs == 0:
            self._free[block] = None
            self._blank[block] = block not in self._kept

    def keep(self, block: int) -> None:
        """The block's content is worth finding again (it entered the prefix cache)."""
        self._kept.add(block)

    def discard(self, block: int) -> bool:
        """The block's content is not worth finding any more; whether it was until now."""
        if block not in self._kept:
            return False
        self._kept.remove(block)
        self._blank[block] = block in self._free
        return True

    def mark_drafted(self, block: int) -> None:
        """The drafter's own keys and values of all the block's tokens are there."""
        self._drafted[block] = 1

    def is_drafted(self, block: int) -> bool:
        """Whether `mark_drafted` was said of the block's content."""
        return bool(self._drafted[block])

    def refs(self, block: int) -> int:
        return self._refs[block]

    def check_integrity(self, owned: dict[int, int]) -> None:
        """Raises AssertionError unless references equal `owned` (block -> number of owners) and free lists agree."""
        for block in range(1, self.num_blocks):
            expected = owned.get(block, 0)
            if self._refs[block] != expected:
                raise AssertionError(f"block {block}: {self._refs[block]} references, {expected} owners")
            if (self._refs[block] == 0) != (block in self._free):
                raise AssertionError(f"block {block}: free list disagrees with {self._refs[block]} references")
            blank = block in self._free and block not in self._kept
            if bool(self._blank[block]) != blank:
                raise AssertionError(f"block {block}: blank flag is wrong")
