"""Many cases at once against one server, and the verdict."""

from __future__ import annotations

import asyncio
import time
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from urllib.parse import urlsplit

from tests.fuzz import leaks
from tests.fuzz.answers import BadAnswerError
from tests.fuzz.case import Case
from tests.fuzz.client import play
from tests.fuzz.raw import make_case

CONCURRENCY = 16
WARM_UP = 64
"""Cases before the first count: lazily opened files and caches are no leaks."""
MAX_FAULTS = 20


@dataclass(slots=True)
class Verdict:
    """`faults` are the cases that went wrong and how; `left` is what the server still holds at the end."""

    num_cases: int = 0
    seconds: float = 0.0
    kinds: Counter[str] = field(default_factory=Counter)
    statuses: Counter[int] = field(default_factory=Counter)
    faults: list[tuple[Case, str]] = field(default_factory=list)
    left: list[str] = field(default_factory=list)

    @property
    def clean(self) -> bool:
        return not self.faults and not self.left

    def summary(self) -> str:
        """A few lines for a terminal."""
        statuses = ", ".join(f"{status}: {count}" for status, count in sorted(self.statuses.items()))
        kinds = ", ".join(f"{kind}: {count}" for kind, count in self.kinds.most_common())
        lines = [
            f"{self.num_cases} cases in {self.seconds:.1f} s ({self.num_cases / max(self.seconds, 1e-9):.0f} a second)",
            f"kinds    {kinds}",
            f"answers  {statuses}",
            *(f"FAULT    {case.name} ({case.kind}): {why}" for case, why in self.faults),
            *(f"LEFT     {what}" for what in self.left),
            "clean" if self.clean else f"{len(self.faults)} faults, {len(self.left)} leaks",
        ]
        return "\n".join(lines)


async def run(
    url: str,
    cases: Iterator[Case],
    *,
    limit_s: float,
    pid: int | None = None,
    progress: Callable[[int], None] = lambda done: None,
) -> Verdict:
    """Plays the cases, CONCURRENCY at a time; gives up after MAX_FAULTS faults. `pid` is a local server's."""
    parts = urlsplit(url)
    host, port = parts.hostname or "127.0.0.1", parts.port or 80
    verdict = Verdict()
    start = time.monotonic()

    async def work() -> None:
        for case in cases:
            if len(verdict.faults) >= MAX_FAULTS:
                return
            try:
                verdict.statuses.update(await play(case, host, port, limit_s))
            except BadAnswerError as error:
                verdict.faults.append((case, str(error)))
            verdict.kinds[case.kind] += 1
            verdict.num_cases += 1
            progress(verdict.num_cases)

    warm = [make_case(0, index) for index in range(WARM_UP)]
    for case in warm:
        await _ignore_faults(case, host, port, limit_s)
    await leaks.settled(url, pid, await leaks.take(url, pid))
    before = await leaks.take(url, pid)
    await asyncio.gather(*(work() for _ in range(CONCURRENCY)))
    verdict.left = await leaks.settled(url, pid, before)
    verdict.seconds = time.monotonic() - start
    return verdict


async def _ignore_faults(case: Case, host: str, port: int, limit_s: float) -> None:
    try:
        await play(case, host, port, limit_s)
    except BadAnswerError:
        return  # the same case may come again, and then it counts


def save_faults(verdict: Verdict, folder: Path) -> list[Path]:
    """One file a fault, to be replayed with `--replay`."""
    paths = []
    for number, (case, why) in enumerate(verdict.faults):
        path = folder / f"fuzz-{number:02}.json"
        case.save(path, why)
        paths.append(path)
    return paths
