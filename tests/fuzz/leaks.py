"""What a server holds: taken before and after, and compared."""

from __future__ import annotations

import asyncio
from dataclasses import dataclass, field
from typing import Any

from tests.fuzz.process import get, open_files

GAUGES = ("num_running", "num_waiting", "num_held", "num_waiting_tokens", "kv_blocks_used")
SETTLE_S = 20.0


@dataclass(frozen=True, slots=True)
class Holdings:
    """`files` by process, where this machine can see them; `process` as far as the server tells."""

    ready: bool
    gauges: dict[str, int]
    num_restarts: int
    process: dict[str, int] = field(default_factory=dict)
    files: dict[int, int] = field(default_factory=dict)

    def excess(self, before: Holdings) -> list[str]:
        """What is held now and should not be: anything in the engine, and more of the rest than before."""
        found = [f"{name} is {value}" for name, value in self.gauges.items() if value]
        if not self.ready:
            found.append("the server is not ready")
        if self.num_restarts != before.num_restarts:
            found.append(f"the engine was restarted {self.num_restarts - before.num_restarts} times")
        if self.files.keys() != before.files.keys():
            found.append(f"processes were {sorted(before.files)} and are {sorted(self.files)}")
        for name, value in self.process.items():
            if value > before.process.get(name, value):
                found.append(f"{name} was {before.process[name]} and is {value}")
        for pid, count in self.files.items():
            if count > before.files.get(pid, count):
                found.append(f"process {pid} had {before.files[pid]} open files and has {count}")
        return found


async def take(url: str, pid: int | None) -> Holdings:
    """`pid` None: the server is another machine's business."""
    return await asyncio.to_thread(_take, url, pid)


def _take(url: str, pid: int | None) -> Holdings:
    status, info = get(url, "/server_info")
    if status != 200:
        return Holdings(False, {}, 0)
    stats: dict[str, Any] = info["stats"]
    process = {name: value for name, value in (info.get("process") or {}).items() if name in ("num_tasks", "num_fds")}
    gauges = {name: stats[name] for name in GAUGES if name in stats}
    ready = get(url, "/ready")[0] == 200
    return Holdings(ready, gauges, info["num_engine_restarts"], process, {} if pid is None else open_files(pid))


async def settled(url: str, pid: int | None, before: Holdings) -> list[str]:
    """What is still held after a while of doing nothing; empty where nothing is."""
    end = asyncio.get_running_loop().time() + SETTLE_S
    while True:
        excess = (await take(url, pid)).excess(before)
        if not excess or asyncio.get_running_loop().time() > end:
            return excess
        await asyncio.sleep(0.1)
