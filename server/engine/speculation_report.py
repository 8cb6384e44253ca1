"""What speculation has brought, and whether and why it is paused: for metrics, `/server_info` and the log."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable

log = logging.getLogger("outpace.engine")

LASTING_S = 10.0
"""A pause, or its end, is logged once it has lasted: a choice that wavers is no news."""
_KEEP = 1.0 - 1.0 / 256.0
"""The realised speed-up is of about the last 256 verify steps."""


class SpeculationReport:
    """Kept up to date by every verify step. Times of day are Unix seconds.

    `step_s` is what verify steps took, drafting included, and `plain_s` what the same tokens would have taken without
    drafts, by the corrected cost table: the realised speed-up is the second over the first. `predicted` is the one that
    the last choice of drafts promised (1: none). `since` and `reason` are there while speculation is paused.
    """

    def __init__(self, clock: Callable[[], float] = time.monotonic, today: Callable[[], float] = time.time) -> None:
        self._clock, self._today = clock, today
        self.since: float | None = None
        self.reason: str | None = None
        self.num_pauses = 0
        self.predicted: float | None = None
        self.step_s = self.plain_s = 0.0
        self._recent = [0.0, 0.0]
        self._changed_at = 0.0
        self._logged = False  # whether the last line said that it is paused

    @property
    def realised(self) -> float | None:
        """Of the last steps; None before the first that was measured."""
        plain, taken = self._recent
        return plain / taken if taken > 0.0 else None

    def took(self, ms: float, plain_ms: float) -> None:
        """A verify step took `ms`; without drafts its tokens would have taken `plain_ms`."""
        if ms <= 0.0:  # not measured
            return
        self.step_s += ms / 1e3
        self.plain_s += plain_ms / 1e3
        self._recent = [plain_ms + _KEEP * self._recent[0], ms + _KEEP * self._recent[1]]

    def chose(self, paused: bool, predicted: float, why: Callable[[], str]) -> None:
        """The last choice; `why` is asked for the reason when a pause begins."""
        self.predicted = predicted
        if paused != (self.since is not None):
            self._changed_at = self._clock()
            self.since = self._today() if paused else None
            self.reason = why() if paused else None
            self.num_pauses += paused
        if paused != self._logged and self._clock() - self._changed_at >= LASTING_S:
            self._logged = paused
            if paused:
                log.info("speculation is paused: %s", self.reason)
            else:
                log.info("speculation goes on: it promises %.2f times the speed of plain decoding", predicted)
