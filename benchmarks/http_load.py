"""How the server behaves when too much is asked of it, when clients do not read, and when processes die.

    python benchmarks/http_load.py overload|slow-readers|kill|stop [--engine scripted|real]

`scripted` puts an engine behind the server that emits one token a step at a fixed pace, so that what is measured is the
HTTP side; `real` is the embedded model. Client and server share the machine's cores.
"""

from __future__ import annotations

import argparse
import asyncio
import itertools
import json
import os
import random
import signal
import socket
import statistics
import subprocess
import sys
import time
from collections.abc import AsyncIterator, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import aiohttp

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from benchmarks.common import Row, median_row, write_result
from benchmarks.http_cost import children, wait_ready

BENCH = Path(__file__).resolve()


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
        command = [sys.executable, str(BENCH.with_name("scripted_server.py")), str(options.step_ms), *flags]
    else:
        command = [sys.executable, "-m", "server", "serve", *flags]
    environment = {**os.environ, "PYTHONPATH": str(BENCH.parent.parent)}
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, env=environment)
    url = f"http://127.0.0.1:{options.port}"
    try:
        wait_ready(url + "/ready")
        yield Target(url, process, f"cpu2/http-{options.engine}")
    finally:
        process.terminate()
        process.wait(60)


def body(max_tokens: int, *, stream: bool = False, **fields: Any) -> dict[str, Any]:
    return {"prompt": "Once upon a time", "max_tokens": max_tokens, "ignore_eos": True, "stream": stream, **fields}


def percentile(values: list[float], share: float) -> float:
    """The smallest value that at least `share` of all values do not exceed."""
    ordered = sorted(values)
    return ordered[min(len(ordered) - 1, int(share * len(ordered)))]


# -- overload --------------------------------------------------------------------------------------------------


@dataclass
class Outcome:
    """What clients saw, in seconds."""

    admitted: list[float] = field(default_factory=list)
    refused: list[float] = field(default_factory=list)


async def greedy_client(http: aiohttp.ClientSession, url: str, tokens: int, until: float, seen: Outcome) -> None:
    """One request after another; after a 429 it waits as long as it is told, and up to a second more, as clients do."""
    while time.perf_counter() < until:
        started = time.perf_counter()
        async with http.post(url + "/v1/completions", json=body(tokens)) as response:
            await response.read()
            took = time.perf_counter() - started
            if response.status == 200:
                seen.admitted.append(took)
            elif response.status == 429:
                seen.refused.append(took)
                await asyncio.sleep(float(response.headers["Retry-After"]) + random.random())
            else:
                raise RuntimeError(f"status {response.status}: {await response.text()}")


async def offered(target: Target, num_clients: int, tokens: int, seconds: float) -> Outcome:
    seen = Outcome()
    until = time.perf_counter() + seconds
    async with aiohttp.ClientSession(connector=aiohttp.TCPConnector(limit=0)) as http:
        clients = []
        for index in range(num_clients):
            clients.append(asyncio.create_task(greedy_client(http, target.url, tokens, until, seen)))
            if index % 16 == 15:
                await asyncio.sleep(0.01)  # nobody's ten thousand clients begin in the same millisecond
        await asyncio.gather(*clients)
    return seen


def overload(options: argparse.Namespace) -> list[Row]:
    """As many clients as there are places, then ten times as many, alternating."""
    slots, waiting, tokens = (16, 32, 24) if options.engine == "scripted" else (8, 16, 24)
    calm_p99: list[float] = []
    full_p99: list[float] = []
    ratios: list[float] = []
    refusals: list[float] = []
    counts: list[str] = []
    with serving(options, max_num_seqs=slots, max_waiting=waiting) as target:
        asyncio.run(offered(target, slots, tokens, 2.0))
        for _ in range(options.repeats):
            calm = asyncio.run(offered(target, slots + waiting, tokens, options.seconds))
            full = asyncio.run(offered(target, 10 * (slots + waiting), tokens, options.seconds))
            calm_p99.append(percentile(calm.admitted, 0.99) * 1e3)
            full_p99.append(percentile(full.admitted, 0.99) * 1e3)
            ratios.append(full_p99[-1] / calm_p99[-1])
            refusals.append(percentile(full.refused, 0.99) * 1e3)
            counts.append(f"{len(full.admitted)} admitted, {len(full.refused)} refused")
    prefix = f"{target.prefix}/overload"
    return [
        median_row(f"{prefix}/p99_ms/queue_full", calm_p99, "ms", f"{slots + waiting} clients, {tokens} tokens each"),
        median_row(f"{prefix}/p99_ms/ten_times", full_p99, "ms", f"{10 * (slots + waiting)} clients; {counts[-1]}"),
        median_row(f"{prefix}/p99_ratio", ratios, "x"),
        median_row(f"{prefix}/refused_p99_ms", refusals, "ms", "time to the 429, on the client's clock"),
    ]


# -- slow readers ----------------------------------------------------------------------------------------------


async def events(http: aiohttp.ClientSession, url: str, request: dict[str, Any]) -> AsyncIterator[float]:
    """The times at which a stream's events arrive."""
    async with http.post(url + "/v1/completions", json=request) as response:
        response.raise_for_status()
        async for line in response.content:
            if line.startswith(b"data: {"):
                yield time.perf_counter()


async def gaps(target: Target, num_streams: int, tokens: int) -> list[float]:
    """Seconds between events of `num_streams` ordinary streams."""

    async def one(http: aiohttp.ClientSession) -> list[float]:
        times = [at async for at in events(http, target.url, body(tokens, stream=True))]
        return [b - a for a, b in itertools.pairwise(times)]

    async with aiohttp.ClientSession(connector=aiohttp.TCPConnector(limit=0)) as http:
        return [
            gap for one_stream in await asyncio.gather(*(one(http) for _ in range(num_streams))) for gap in one_stream
        ]


class SlowReaders:
    """Clients that take a byte a second of a stream that never ends."""

    def __init__(self, target: Target, count: int, request: dict[str, Any]) -> None:
        self._target, self._count, self._request = target, count, request
        self._sockets: list[socket.socket] = []
        self._task: asyncio.Task[None] | None = None

    async def __aenter__(self) -> SlowReaders:
        data = json.dumps(self._request).encode()
        head = (
            "POST /v1/completions HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\n"
            f"Content-Length: {len(data)}\r\n\r\n"
        )
        for _ in range(self._count):
            connection = socket.socket()
            connection.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
            connection.connect(("127.0.0.1", self._target.port))
            connection.sendall(head.encode() + data)
            connection.setblocking(False)
            self._sockets.append(connection)
        self._task = asyncio.create_task(self._read())
        return self

    async def _read(self) -> None:
        while True:
            await asyncio.sleep(1.0)
            for connection in self._sockets:
                try:
                    connection.recv(1)
                except BlockingIOError:
                    continue

    async def all_held(self) -> dict[str, Any]:
        """Waits until the engine works for none of them."""
        while True:
            stats: dict[str, Any] = (await self._target.info())["stats"]
            if stats["num_held"] == self._count:
                return stats
            await asyncio.sleep(0.5)

    async def __aexit__(self, *_: object) -> None:
        assert self._task is not None
        self._task.cancel()
        for connection in self._sockets:
            connection.close()


def rss_mib(pid: int) -> float:
    pages = int(Path(f"/proc/{pid}/statm").read_text().split()[1])
    return pages * os.sysconf("SC_PAGE_SIZE") / 2**20


def slow_readers(options: argparse.Namespace) -> list[Row]:
    """Eight ordinary streams alone, and beside 64 clients that read a byte a second, alternating on one server."""
    tokens = 200 if options.engine == "scripted" else 48
    slow = body(4000, stream=True, logprobs=20 if options.engine == "real" else None)
    alone: list[float] = []
    beside: list[float] = []
    ratios: list[float] = []
    memory: list[float] = []
    with serving(options, max_num_seqs=16, max_waiting=128, stream_buffer_tokens=64) as target:
        pid = target.process.pid

        async def run() -> None:
            await gaps(target, 8, tokens)
            for _ in range(options.repeats):
                alone.append(statistics.mean(await gaps(target, 8, tokens)) * 1e3)
                before = rss_mib(pid)
                async with SlowReaders(target, 64, slow) as readers:
                    await readers.all_held()
                    memory.append(rss_mib(pid) - before)
                    beside.append(statistics.mean(await gaps(target, 8, tokens)) * 1e3)
                ratios.append(beside[-1] / alone[-1])
                await settled(target)

        asyncio.run(run())
    prefix = f"{target.prefix}/slow_readers"
    return [
        median_row(f"{prefix}/itl_ms/alone", alone, "ms", "8 streams, mean gap between events"),
        median_row(f"{prefix}/itl_ms/beside_64", beside, "ms", "the same beside 64 clients that read a byte a second"),
        median_row(f"{prefix}/itl_ratio", ratios, "x"),
        median_row(f"{prefix}/memory_mib", memory, "MiB", "what the API process grew by for 64 of them"),
    ]


# -- death and end ---------------------------------------------------------------------------------------------


async def collect(http: aiohttp.ClientSession, url: str, request: dict[str, Any]) -> tuple[str, float, int]:
    """How a stream ended (`done`, `error` with its code, or `broken`), when, and how many chunks came."""
    num_chunks, end = 0, "broken"
    try:
        async with http.post(url + "/v1/completions", json=request) as response:
            if response.status != 200:
                return f"status {response.status}", time.perf_counter(), 0
            async for line in response.content:
                if line.startswith(b"data: [DONE]"):
                    end = "done"
                elif line.startswith(b'data: {"error"'):
                    end = f"error {json.loads(line[6:])['error']['code']}"
                elif line.startswith(b"data: {"):
                    num_chunks += 1
    except aiohttp.ClientError:
        end = "broken"
    return end, time.perf_counter(), num_chunks


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


def kill(options: argparse.Namespace) -> list[Row]:
    """SIGKILL of the engine under 16 streams."""
    ends: list[float] = []
    ready: list[float] = []
    how: list[str] = []
    leaks: list[float] = []
    with serving(options, max_num_seqs=16) as target:

        async def run() -> None:
            async with aiohttp.ClientSession(connector=aiohttp.TCPConnector(limit=0)) as http:
                await asyncio.gather(*(collect(http, target.url, body(4, stream=True)) for _ in range(16)))
            before = (await settled(target)).get("process", {})
            for _ in range(options.repeats):
                async with aiohttp.ClientSession(connector=aiohttp.TCPConnector(limit=0)) as http:
                    streams = [
                        asyncio.create_task(collect(http, target.url, body(4000, stream=True))) for _ in range(16)
                    ]
                    await asyncio.sleep(2.0)
                    os.kill(target.engine_pid(), signal.SIGKILL)
                    killed = time.perf_counter()
                    outcomes = await asyncio.gather(*streams)
                ends.append(max(at for _, at, _ in outcomes) - killed)
                how.extend(end for end, _, _ in outcomes)
                ready.append(await until_ready(target.url) - killed)
                after = (await settled(target)).get("process", {})
                leaks.append(sum(max(0, after[name] - before[name]) for name in before if name.startswith("num_")))

        asyncio.run(run())
    prefix = f"{target.prefix}/kill"
    kinds = ", ".join(f"{how.count(end)} {end}" for end in sorted(set(how)))
    return [
        median_row(f"{prefix}/streams_end_s", ends, "s", f"16 streams each: {kinds}"),
        median_row(f"{prefix}/ready_again_s", ready, "s"),
        median_row(f"{prefix}/leaked", leaks, "", "tasks and file descriptors more than before"),
    ]


def stop(options: argparse.Namespace) -> list[Row]:
    """SIGTERM under load: what was admitted is answered."""
    lost: list[float] = []
    took: list[float] = []
    notes: list[str] = []
    for _ in range(options.repeats):
        with serving(options, max_num_seqs=16, drain_timeout_s=60) as target:

            async def run(target: Target = target) -> None:
                async with aiohttp.ClientSession(connector=aiohttp.TCPConnector(limit=0)) as http:
                    streams = [asyncio.create_task(collect(http, target.url, body(32, stream=True))) for _ in range(48)]
                    await asyncio.sleep(1.0)
                    target.process.send_signal(signal.SIGTERM)
                    stopped = time.perf_counter()
                    outcomes = await asyncio.gather(*streams)
                admitted = [o for o in outcomes if not o[0].startswith("status")]
                whole = [o for o in admitted if o[0] == "done" and o[2] >= 1]
                lost.append(float(len(admitted) - len(whole)))
                notes.append(f"{len(admitted)} admitted")
                target.process.wait(60)
                took.append(time.perf_counter() - stopped)

            asyncio.run(run())
    prefix = f"cpu2/http-{options.engine}/stop"
    return [
        median_row(f"{prefix}/lost", lost, "", notes[-1]),
        median_row(f"{prefix}/exit_s", took, "s", "from SIGTERM to the process's end"),
    ]


CASES = {"overload": overload, "slow-readers": slow_readers, "kill": kill, "stop": stop}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("case", choices=CASES)
    parser.add_argument("--engine", choices=("scripted", "real"), default="scripted")
    parser.add_argument("--step-ms", type=float, default=20.0)
    parser.add_argument("--threads", type=int, help="of the engine; by default it takes every core, the clients' too")
    parser.add_argument("--seconds", type=float, default=10.0)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--port", type=int, default=8392)
    options = parser.parse_args()
    rows = CASES[options.case](options)
    name = f"http_{options.case.replace('-', '_')}_{options.engine}"
    if options.threads is not None:
        rows = [replace(row, case=f"{row.case}/threads{options.threads}") for row in rows]
        name += f"_threads{options.threads}"
    write_result(name, rows)


if __name__ == "__main__":
    main()
