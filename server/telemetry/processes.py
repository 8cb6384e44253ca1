"""CPU time and memory of processes, from /proc; where there is none, nothing."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path

_PROC = Path("/proc")


@dataclass(frozen=True, slots=True)
class ProcessUse:
    """`cpu_s` since it started, `resident_bytes` now; of several processes the sums."""

    cpu_s: float = 0.0
    resident_bytes: int = 0

    def __add__(self, other: ProcessUse) -> ProcessUse:
        return ProcessUse(self.cpu_s + other.cpu_s, self.resident_bytes + other.resident_bytes)


def process_use(pid: int) -> ProcessUse | None:
    """None if there is no such process."""
    try:
        # After the name, which may hold anything, in parentheses; numbered as in proc(5), from the third.
        fields = (_PROC / str(pid) / "stat").read_text().rpartition(")")[2].split()
        pages = int((_PROC / str(pid) / "statm").read_text().split()[1])
    except (OSError, IndexError):
        return None
    ticks = int(fields[11]) + int(fields[12])
    return ProcessUse(ticks / os.sysconf("SC_CLK_TCK"), pages * os.sysconf("SC_PAGE_SIZE"))


def children(pid: int) -> list[int]:
    """The processes that `pid`'s threads started and that live."""
    found: list[int] = []
    for task in (_PROC / str(pid) / "task").glob("*/children"):
        try:
            found += map(int, task.read_text().split())
        except OSError:  # the thread has just ended
            continue
    return found
