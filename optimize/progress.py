"""A bar on standard error: one line on a terminal, few whole lines elsewhere. No torch."""

from __future__ import annotations

import sys
import time
from typing import TextIO

_WIDTH = 24
_EVERY_S = 10.0


class Bar:
    """Called with what is being done and which fraction of it is done."""

    def __init__(self, stream: TextIO | None = None) -> None:
        self._stream = stream or sys.stderr
        self._terminal = self._stream.isatty()
        self._shown: tuple[str, int] | None = None
        self._said = 0.0

    def __call__(self, what: str, fraction: float) -> None:
        percent = int(100 * min(max(fraction, 0.0), 1.0))
        if self._shown == (what, percent):
            return
        now, new = time.monotonic(), self._shown is None or self._shown[0] != what
        if not self._terminal and not new and percent < 100 and now - self._said < _EVERY_S:
            return
        self._shown, self._said = (what, percent), now
        bar = f"[{'#' * (percent * _WIDTH // 100):-<{_WIDTH}}] {percent:3d} %  {what}"
        start, end = ("\r\x1b[K", "\n" if percent == 100 else "") if self._terminal else ("", "\n")
        print(f"{start}{bar}", end=end, file=self._stream, flush=True)
