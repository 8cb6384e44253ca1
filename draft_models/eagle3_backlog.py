"""What an EAGLE-3 drafter on the CPU still has to compute, and which cached blocks it can rely on.

Position p holds token p and the target's features of token p - 1. A slot's *backlog* is the features that wait until
the next chain, or prompt chunk, makes keys and values of them: those of the tokens that a verify step has emitted, and
those of a pause, in which the drafter does not run. The last REACH are kept, so a shorter pause costs no context.

A block that is full is known by the tokens up to its end. Whoever gets it by a prefix hit asks whether its keys and
values were computed for those very tokens: it may have changed hands while drafting was paused.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

REACH = 256
"""Most features that wait in a slot: 7 kB a token for SmolLM2-135M."""
NOBODY = 0
"""Key of a block whose draft keys and values are not complete."""


@dataclass(slots=True)
class Tail:
    """A slot's end. Keys and values of the positions `first` … `done` - 1 are right; `done` is -1 before it is known.

    Features of `count` tokens wait, from token `done` - 1 on (that of token -1 is zero). The `settled` first blocks
    are registered, `key` is that of the last of them.
    """

    tokens: list[int] = field(default_factory=list)
    done: int = -1
    first: int = 0
    count: int = 0
    settled: int = 0
    key: int = NOBODY


class Backlog:
    """S slots, blocks of `block_size` tokens, features of `width` values of the dtype of `like`."""

    def __init__(self, num_slots: int, num_blocks: int, block_size: int, width: int, like: Tensor) -> None:
        self.block_size = block_size
        self.tails = [Tail() for _ in range(num_slots)]
        self._waiting = torch.empty(num_slots, REACH, width, dtype=like.dtype)
        self._by_block = torch.zeros(num_blocks, width, dtype=like.dtype)
        self._owner = [NOBODY] * num_blocks

    def admit(self, slot: int, token_ids: Sequence[int]) -> None:
        """`slot` has a new owner with these tokens."""
        self.tails[slot] = Tail(list(token_ids))

    def waiting(self, slot: int) -> Tensor:
        """Features [count, F] that wait in `slot`: a view."""
        return self._waiting[slot, : self.tails[slot].count]

    def align(self, slot: int, start: int, blocks: Sequence[int]) -> Tail:
        """The slot's tail, now that features from token `start` on are about to come."""
        tail = self.tails[slot]
        if tail.done < 0:
            self._find(tail, slot, start, blocks)
        elif tail.done + tail.count - 1 != start:  # some were not shown
            tail.first = tail.done = start + 1
            tail.count = 0
        return tail

    def _find(self, tail: Tail, slot: int, start: int, blocks: Sequence[int]) -> None:
        """Where to begin behind a prefix hit of `start` tokens: what its blocks hold counts while unbroken."""
        size = self.block_size
        tail.settled = start // size
        keys = []
        for b in range(tail.settled):
            tail.key = _block_key(tail.key, tail.tokens[b * size : (b + 1) * size])
            keys.append(tail.key)
        known = start
        while known and self._owner[blocks[known // size - 1]] == keys[known // size - 1]:
            known -= size
        if start and known == start:  # not even the features that position `start` takes
            tail.first = tail.done = start + 1
            return
        tail.first, tail.done, tail.count = known, start, 1
        self._waiting[slot, 0] = self._by_block[blocks[tail.settled - 1]] if start else 0.0

    def append(self, slot: int, start: int, features: Tensor, blocks: Sequence[int]) -> None:
        """`features` [m, F] of the tokens from `start` on wait too; the oldest give way."""
        tail, num = self.align(slot, start, blocks), features.shape[0]
        self.keep_ends(start, features, blocks)
        if tail.count + num > REACH:
            dropped = max(tail.count + num - REACH, min(tail.count, REACH // 2))
            left = max(0, tail.count - dropped)
            self._waiting[slot, :left] = self._waiting[slot, tail.count - left : tail.count].clone()
            features = features[max(0, dropped - tail.count) :]
            tail.done += dropped
            tail.first, tail.count, num = tail.done, left, features.shape[0]
        self._waiting[slot, tail.count : tail.count + num] = features
        tail.count += num

    def keep_ends(self, start: int, features: Tensor, blocks: Sequence[int]) -> None:
        """Keeps, of the features [m, F] from token `start` on, those of blocks' last tokens with the blocks."""
        size = self.block_size
        ending = range(start // size, (start + features.shape[0]) // size)
        if ending:
            for b in ending:
                self._owner[blocks[b]] = NOBODY
            self._by_block[[blocks[b] for b in ending]] = features[[(b + 1) * size - 1 - start for b in ending]]

    def advance(self, slot: int, done: int, blocks: Sequence[int], last: Tensor | None = None) -> None:
        """Keys and values are right up to `done`; of the features, `last` [F] waits, the token's before it, or none."""
        tail = self.tails[slot]
        tail.done, tail.count = done, 0
        if last is not None:
            self._waiting[slot, 0] = last
            tail.count = 1
        self.settle(tail, blocks)

    def disown(self, start: int, end: int, blocks: Sequence[int]) -> None:
        """Positions `start` … `end` - 1 are about to be written: their blocks hold nothing yet that is complete."""
        size = self.block_size
        for b in range(start // size, min(-(-end // size), len(blocks))):
            self._owner[blocks[b]] = NOBODY

    def settle(self, tail: Tail, blocks: Sequence[int]) -> None:
        """Registers the blocks whose keys, values and last features are there."""
        size, known = self.block_size, min(tail.done, tail.done + tail.count - 1, len(tail.tokens))
        while (end := (tail.settled + 1) * size) <= known:
            tail.key = _block_key(tail.key, tail.tokens[end - size : end])
            complete = tail.first <= end - size
            self._owner[blocks[tail.settled]] = tail.key if complete else NOBODY
            tail.settled += 1


def _block_key(parent: int, token_ids: Sequence[int]) -> int:
    """Key of a block with these tokens behind `parent`. A collision would cost acceptance, never output."""
    return hash((parent, *token_ids)) or 1
