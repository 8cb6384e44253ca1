"""What is shown while a run goes on: a line redrawn in place on a terminal, a line now and then elsewhere."""

from __future__ import annotations

import shutil
import time
from typing import TextIO

from loadtest.generator import PROGRESS_S, Progress

_PLAIN_S = 5.0


def _percentiles(values: list[float], digits: int = 0) -> str:
    ordered = sorted(values)
    middle, high = (ordered[int(share * (len(ordered) - 1))] for share in (0.5, 0.95))
    return f"p50 {1e3 * middle:.{digits}f} p95 {1e3 * high:.{digits}f}"


class Live:
    """Takes each process's progress and shows the sum."""

    def __init__(self, out: TextIO, in_place: bool) -> None:
        self._out, self._in_place = out, in_place
        self._latest: dict[int, Progress] = {}
        self._before = Progress()
        self._shown = time.monotonic()
        self._ttfts: list[float] = []
        self._itls: list[float] = []

    def take(self, share: int, progress: Progress) -> None:
        """News of one process."""
        self._latest[share] = progress
        self._ttfts += progress.ttfts
        self._itls += progress.itls
        if time.monotonic() - self._shown >= (PROGRESS_S if self._in_place else _PLAIN_S):
            self.show()

    def show(self) -> None:
        """Draws what is known now; rates and latencies are those since the line before."""
        now = Progress(at=max((p.at for p in self._latest.values()), default=0.0))
        for progress in self._latest.values():
            now.sent += progress.sent
            now.ended += progress.ended
            now.tokens += progress.tokens
            now.errors += progress.errors
        passed = max(now.at - self._before.at, 1e-9)
        line = (
            f"{now.at:6.1f} s  sent {now.sent}  done {now.ended}  open {now.sent - now.ended}  "
            f"errors {now.errors.total()}  {(now.ended - self._before.ended) / passed:.1f} req/s  "
            f"{(now.tokens - self._before.tokens) / passed:.0f} tok/s"
        )
        if self._ttfts:
            line += f"  ttft {_percentiles(self._ttfts)} ms"
        if self._itls:
            line += f"  tpot {_percentiles(self._itls, 1)} ms"
        if self._in_place:
            width = shutil.get_terminal_size().columns - 1
            self._out.write(f"\r\x1b[K{line[:width]}")
        else:
            self._out.write(line + "\n")
        self._out.flush()
        self._before, self._shown = now, time.monotonic()
        self._ttfts, self._itls = [], []

    def end(self) -> None:
        """The last line stays."""
        if self._latest:
            self.show()
        if self._in_place:
            self._out.write("\n")
