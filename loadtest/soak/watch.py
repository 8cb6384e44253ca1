"""What the server holds: memory and file descriptors of its processes (Linux), its own gauges."""

from __future__ import annotations

import os
import re
import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import aiohttp

from loadtest.settings import Target

GAUGES = ("outpace_requests_running", "outpace_requests_waiting", "outpace_kv_cache_usage_ratio")
"""Of an Outpace server. At rest each is what it was before: 0."""
VLLM_GAUGES = ("vllm:num_requests_running", "vllm:num_requests_waiting", "vllm:kv_cache_usage_perc")
_WARM = 0.25
"""Of a span between two engines: caches fill, allocators take what they keep."""


@dataclass(frozen=True, slots=True)
class Held:
    """A process and all below it at one moment; `rss` in bytes."""

    at: float
    rss: int
    descriptors: int
    pids: tuple[int, ...]


def tree(pid: int) -> list[int]:
    """The process and its descendants."""
    found = [pid]
    for parent in found:
        try:
            for task in Path(f"/proc/{parent}/task").iterdir():
                found += [int(child) for child in (task / "children").read_text().split()]
        except OSError:  # it has ended
            continue
    return found


def held(pid: int, at: float) -> Held:
    """What the tree holds now; a process that ends meanwhile counts nothing."""
    rss = descriptors = 0
    pids = tree(pid)
    for each in pids:
        try:
            rss += int(Path(f"/proc/{each}/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")
            descriptors += sum(1 for _ in Path(f"/proc/{each}/fd").iterdir())
        except OSError:
            continue
    return Held(at, rss, descriptors, tuple(sorted(pids)))


def engine_of(pid: int) -> int | None:
    """The child that holds the most memory: the one with the model."""
    children = [child for child in tree(pid) if child != pid]
    return max(children, key=lambda child: held(child, 0.0).rss, default=None)


def rss_growth(samples: Sequence[Held]) -> float:
    """Relative growth within the longest time in which the processes were the same, its first quarter left out.

    The median of the last fifth over that of the first; NaN for fewer than ten samples.
    """
    spans: list[list[Held]] = []
    for sample in samples:
        if not spans or spans[-1][-1].pids != sample.pids:
            spans.append([])
        spans[-1].append(sample)
    longest = max(spans, key=len, default=[])
    longest = longest[int(len(longest) * _WARM) :]
    if len(longest) < 10:
        return float("nan")
    fifth = len(longest) // 5
    first, last = (statistics.median(s.rss for s in part) for part in (longest[:fifth], longest[-fifth:]))
    return last / first - 1


class Server:
    """Reads the server's metrics and readiness."""

    def __init__(self, http: aiohttp.ClientSession, target: Target) -> None:
        self._http, self._base = http, target.url.rstrip("/").removesuffix("/v1")

    async def metrics(self) -> dict[str, float]:
        """Sums over labels by name; empty where there are none."""
        try:
            async with self._http.get(f"{self._base}/metrics") as response:
                text = await response.text() if response.status == 200 else ""
        except (aiohttp.ClientError, OSError, TimeoutError):
            return {}
        sums: dict[str, float] = {}
        for name, labels, value in re.findall(r"^([\w:]+)(\{.*\})? (\S+)", text, re.MULTILINE):
            sums[name] = sums.get(name, 0.0) + float(value)
            if reason := re.search(r'finish_reason="(\w+)"', labels):
                key = f"{name} {reason[1]}"
                sums[key] = sums.get(key, 0.0) + float(value)
        return sums

    async def ready(self) -> bool:
        """Whether it serves; servers without /ready are asked for /health."""
        for path in ("/ready", "/health"):
            try:
                async with self._http.get(self._base + path) as response:
                    if response.status != 404:
                        return response.status == 200
            except (aiohttp.ClientError, OSError, TimeoutError):
                return False
        return True


def gauges(metrics: dict[str, float]) -> dict[str, float]:
    """Those of the metrics that must be the same whenever the server is at rest."""
    return {name: metrics[name] for name in (*GAUGES, *VLLM_GAUGES) if name in metrics}
