"""Stable slots: a request owns one index of every per-slot tensor for as long as it runs. Pure bookkeeping."""

from __future__ import annotations

import heapq


class SlotPool:
    """Hands out the lowest free index, so that few slots stay in use at low load."""

    def __init__(self, num_slots: int) -> None:
        self.num_slots = num_slots
        self._free = list(range(num_slots))
        self._used: set[int] = set()

    @property
    def num_free(self) -> int:
        return len(self._free)

    def acquire(self) -> int:
        """A free slot. Raises IndexError if none is left (callers look at `num_free` first)."""
        slot = heapq.heappop(self._free)
        self._used.add(slot)
        return slot

    def release(self, slot: int) -> None:
        self._used.remove(slot)
        heapq.heappush(self._free, slot)

    def check_integrity(self, owned: set[int]) -> None:
        """Raises AssertionError unless exactly the slots `owned` are in use and every slot is accounted for."""
        if self._used != owned:
            raise AssertionError(f"slots in use {sorted(self._used)}, owned {sorted(owned)}")
        if sorted([*self._free, *self._used]) != list(range(self.num_slots)):
            raise AssertionError("slots lost or doubled")
