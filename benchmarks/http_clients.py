"""Clients of `http_load.py`: some ask again and again, some read slowly, some only note how a stream ends."""

from __future__ import annotations

import asyncio
import itertools
import json
import random
import socket
import time
from collections.abc import AsyncIterator
from dataclasses import dataclass, field
from typing import Any

import aiohttp

from benchmarks.http_target import Target


def body(max_tokens: int, *, stream: bool = False, **fields: Any) -> dict[str, Any]:
    return {"prompt": "Once upon a time", "max_tokens": max_tokens, "ignore_eos": True, "stream": stream, **fields}


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
