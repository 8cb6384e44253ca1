"""The server that `http_load.py` puts load on, and what can be asked of it."""

from __future__ import annotations

import argparse
import asyncio
import os
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import aiohttp

from benchmarks.common import ROOT
from benchmarks.http_cost import children, wait_ready


@dataclass
class Target:
    """A running server; `prefix` begins the cases measured on it."""

    url: str
    process: subprocess.Popen[bytes]
    prefix: str

    @property
    def port(self) -> int:
        return int(self.url.rsplit(":", 1)[1])

    def engine_pid(self) -> int:
        names = ("scripted_engine.py", "server.engine.process")
        return next(pid for name in names for pid in children(self.process.pid, name))

    async def info(self) -> dict[str, Any]:
        async with aiohttp.ClientSession() as http, http.get(self.url + "/server_info") as response:
            return dict(await response.json())


@contextmanager
def serving(options: argparse.Namespace, **settings: Any) -> Iterator[Target]:
    """A server with these settings of `outpace serve`."""
    flags = [word for name, value in settings.items() for word in (f"--{name.replace('_', '-')}", str(value))]
    flags += [] if options.threads is None else ["--num-threads", str(options.threads)]
    flags += ["--port", str(options.port), "--access-log", "off", "--log-level", "error"]
    if options.engine == "scripted":
        command = [sys.executable, str(Path(__file__).with_name("scripted_server.py")), str(options.step_ms), *flags]
    else:
        command = [sys.executable, "-m", "server", "serve", *flags]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, env=environment)
    url = f"http://127.0.0.1:{options.port}"
    try:
        wait_ready(url + "/ready")
        yield Target(url, process, f"cpu2/http-{options.engine}")
    finally:
        process.terminate()
        process.wait(60)


async def until_ready(url: str) -> float:
    """The time at which /ready says 200 again."""
    async with aiohttp.ClientSession() as http:
        while True:
            async with http.get(url + "/ready") as response:
                if response.status == 200:
                    return time.perf_counter()
            await asyncio.sleep(0.02)


async def settled(target: Target) -> dict[str, Any]:
    """What the server says of itself once it has nothing to do."""
    info: dict[str, Any] = {}
    for _ in range(100):
        info = await target.info()
        stats = info["stats"]
        if stats["num_running"] == stats["num_waiting"] == stats["num_held"] == stats["kv_blocks_used"] == 0:
            return info
        await asyncio.sleep(0.1)
    return info


def rss_mib(pid: int) -> float:
    pages = int(Path(f"/proc/{pid}/statm").read_text().split()[1])
    return pages * os.sysconf("SC_PAGE_SIZE") / 2**20
