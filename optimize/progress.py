"""A bar on standard error: one line on a terminal, few whole lines elsewhere. No torch."""

from __future__ import annotations

import sys
import time
from typing import TextIO

_WIDTH = 24
_EVERY_S = 10.0
_LEFT_FROM_S = 5.0
"""Before that, the time that is left is a guess."""


class Bar:
    """Called with what is being done and which fraction of it is done."""

    def __init__(self, stream: TextIO | None = None) -> None:
        self._stream = stream or sys.stderr
        self._terminal = self._stream.isatty()
        self._shown: tuple[str, int] | None = None
        self._said = self._began = 0.0
        self._first = 0.0

    def __call__(self, what: str, fraction: float) -> None:
        fraction = min(max(fraction, 0.0), 1.0)
        percent = int(100 * fraction)
        if self._shown == (what, percent):
            return
        now, new = time.monotonic(), self._shown is None or self._shown[0] != what
        if new:
            self._began, self._first = now, fraction
        if not self._terminal and not new and percent < 100 and now - self._said < _EVERY_S:
            return
        self._end_line(new)
        self._shown, self._said = (what, percent), now
        bar = f"[{'#' * (percent * _WIDTH // 100):-<{_WIDTH}}] {percent:3d} %  {what}{self._left(now, fraction)}"
        start, end = ("\r\x1b[K", "\n" if percent == 100 else "") if self._terminal else ("", "\n")
        print(f"{start}{bar}", end=end, file=self._stream, flush=True)

    def line(self, text: str) -> None:
        """A line of its own, not behind an unfinished bar."""
        self._end_line(True)
        self._shown = None
        print(text, file=self._stream, flush=True)

    def _end_line(self, new: bool) -> None:
        """On a terminal: what stopped short of its end stays readable."""
        if new and self._terminal and self._shown is not None and self._shown[1] < 100:
            print(file=self._stream)

    def _left(self, now: float, fraction: float) -> str:
        """`, 2 min left` at the rate so far."""
        spent, done = now - self._began, fraction - self._first
        if fraction >= 1.0 or done <= 0.0 or spent < _LEFT_FROM_S:
            return ""
        seconds = spent / done * (1.0 - fraction)
        return f", {seconds / 60:.0f} min left" if seconds >= 90 else f", {seconds:.0f} s left"
