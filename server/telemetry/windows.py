"""Distributions of the last minute, ten minutes and hour, in slots that are dropped as they age.

Slots are numbered by the clock, which all processes of a machine share, so slots of several processes add up.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from server.telemetry.sketch import Sketch


@dataclass(frozen=True, slots=True)
class Window:
    """The last `span_s` to `span_s + slot_s` seconds: the slot that is being filled and as many whole ones as fit."""

    name: str
    span_s: int
    slot_s: int

    def oldest(self, now: float) -> int:
        """The number of the first slot that still counts."""
        return int(now // self.slot_s) - self.span_s // self.slot_s


WINDOWS = (Window("1m", 60, 5), Window("10m", 600, 30), Window("1h", 3600, 300))
SLOT_S = WINDOWS[0].slot_s
"""Each slot of a longer window is a whole number of these."""


@dataclass(frozen=True, slots=True)
class Slot:
    """What one process measured of an arm's `metric` in one slot of a window; `first` and `counts`: `Sketch.packed`."""

    arm: str
    metric: str
    window: str
    index: int
    first: int
    counts: bytes
    total: float


class WindowedSketch:
    """One metric of one arm. Times are seconds of a clock that never goes back."""

    def __init__(self) -> None:
        self._open = Sketch()
        self._open_index = 0
        self._slots: dict[str, dict[int, Sketch]] = {window.name: {} for window in WINDOWS}

    def add(self, now: float, values: NDArray[np.float64], weights: NDArray[np.float64] | None = None) -> None:
        """`values` [n] that were all measured in the slot of `now`."""
        self._advance(now)
        self._open.add(values, weights)

    def _advance(self, now: float) -> None:
        index = int(now // SLOT_S)
        if index == self._open_index:
            return
        if self._open.total or self._open.counts.any():
            self._close(now)
            self._open = Sketch()
        self._open_index = index

    def _close(self, now: float) -> None:
        for window in WINDOWS:
            slots = self._slots[window.name]
            index = self._open_index * SLOT_S // window.slot_s
            if index in slots:
                slots[index].merge(self._open)
            else:
                slots[index] = self._open if window is WINDOWS[0] else _copy(self._open)
            oldest = window.oldest(now)
            while slots and (first := next(iter(slots))) < oldest:  # they were added in order
                del slots[first]

    def slots(self, arm: str, metric: str, now: float) -> Iterable[Slot]:
        """Everything that still counts, the slot that is being filled included."""
        self._advance(now)
        has_open = bool(self._open.counts.any())
        for window in WINDOWS:
            slots = dict(self._slots[window.name])
            if has_open:
                index = self._open_index * SLOT_S // window.slot_s
                filled = _copy(self._open)
                if index in slots:
                    filled.merge(slots[index])
                slots[index] = filled
            oldest = window.oldest(now)
            for index, sketch in slots.items():
                if index >= oldest:
                    yield Slot(arm, metric, window.name, index, *sketch.packed(), sketch.total)


def _copy(sketch: Sketch) -> Sketch:
    copy = Sketch()
    copy.merge(sketch)
    return copy


def current(slots: Iterable[Slot], now: float) -> list[Slot]:
    """Those that still count."""
    oldest = {window.name: window.oldest(now) for window in WINDOWS}
    return [slot for slot in slots if slot.index >= oldest[slot.window]]


def combined(slots: Iterable[Slot], now: float) -> dict[tuple[str, str, str], Sketch]:
    """The distribution by (arm, metric, window) of slots of any number of processes; what is too old is left out."""
    found: dict[tuple[str, str, str], Sketch] = {}
    for slot in current(slots, now):
        key = slot.arm, slot.metric, slot.window
        found.setdefault(key, Sketch()).add_packed(slot.first, slot.counts, slot.total)
    return found
