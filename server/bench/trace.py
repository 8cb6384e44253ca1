"""Reads what torch's profiler wrote: where the time went by kernel, and how long the device had nothing to do.

Never imports torch.
"""

from __future__ import annotations

import gzip
import json
from collections import defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

DEVICE_KINDS = ("kernel", "gpu_memcpy", "gpu_memset")
HOST_KINDS = ("cpu_op",)


@dataclass(frozen=True, slots=True)
class Span:
    """Something that ran from `start` for `length` microseconds; `track` is its process and thread or stream."""

    name: str
    start: float
    length: float
    track: tuple[str, str]

    @property
    def end(self) -> float:
        return self.start + self.length


@dataclass(frozen=True, slots=True)
class Total:
    """All calls of one kernel, or of one operator on the CPU without those that it called."""

    name: str
    calls: int
    total_ms: float
    share: float


@dataclass(frozen=True, slots=True)
class Gaps:
    """Microseconds between the first and the last span at which nothing ran: how often, in all, and the longest."""

    count: int
    total_us: float
    longest_us: float
    busy_us: float


def read_spans(file: Path, kinds: Sequence[str]) -> list[Span]:
    """The complete events of these categories in a Chrome trace (`.gz` or plain), by start."""
    raw = file.read_bytes()
    content: dict[str, Any] = json.loads(gzip.decompress(raw) if file.suffix == ".gz" else raw)
    spans = [
        Span(str(e["name"]), float(e["ts"]), float(e.get("dur", 0.0)), (str(e.get("pid")), str(e.get("tid"))))
        for e in content["traceEvents"]
        if e.get("ph") == "X" and e.get("cat") in kinds
    ]
    return sorted(spans, key=lambda span: (span.start, -span.length))


def totals(spans: Iterable[Span]) -> list[Total]:
    """By name, the longest first; a span inside another on its track is taken off that one's time."""
    own_us: dict[str, float] = defaultdict(float)
    calls: dict[str, int] = defaultdict(int)
    open_spans: dict[tuple[str, str], list[Span]] = defaultdict(list)
    for span in spans:
        calls[span.name] += 1
        own_us[span.name] += span.length
        stack = open_spans[span.track]
        while stack and stack[-1].end <= span.start:
            stack.pop()
        if stack and span.end <= stack[-1].end:  # overlapping kernels of one stream are no children
            own_us[stack[-1].name] -= span.length
        stack.append(span)
    whole = sum(own_us.values()) or 1.0
    found = [Total(name, calls[name], us / 1e3, us / whole) for name, us in own_us.items()]
    return sorted(found, key=lambda total: -total.total_ms)


def gaps(spans: Iterable[Span]) -> Gaps:
    """Of spans by start; what runs at the same time, on whatever stream, counts once."""
    count, total, longest, busy = 0, 0.0, 0.0, 0.0
    end: float | None = None
    for span in spans:
        if end is None:
            end, busy = span.end, span.length
            continue
        idle = span.start - end
        if idle > 0:
            count, total, longest = count + 1, total + idle, max(longest, idle)
        busy += max(0.0, span.end - max(end, span.start))
        end = max(end, span.end)
    return Gaps(count, total, longest, busy)
