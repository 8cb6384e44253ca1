"""Small servers on loopback, guarded as the real one is, and clients that speak raw bytes to them."""

from __future__ import annotations

import asyncio
import json
import socket
import ssl
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager, suppress
from dataclasses import dataclass, field
from typing import Any

import aiohttp
from aiohttp import web

from server.api.access.guard import GuardedRunner, GuardedServer, GuardedSite


@dataclass
class Server:
    """A running server; `refusals` is what its guard turned away."""

    port: int
    guard: GuardedServer
    refusals: list[tuple[str | None, int, str, str]] = field(default_factory=list)
    scheme: str = "http"
    opened: list[Raw] = field(default_factory=list)

    @property
    def url(self) -> str:
        return f"{self.scheme}://127.0.0.1:{self.port}"


@asynccontextmanager
async def serving(
    app: web.Application,
    *,
    header_timeout_s: float = 30.0,
    max_header_bytes: int = 16384,
    ssl_context: ssl.SSLContext | None = None,
) -> AsyncIterator[Server]:
    refusals: list[tuple[str | None, int, str, str]] = []

    def refused(remote: str | None, status: int, request_id: str, code: str) -> None:
        refusals.append((remote, status, request_id, code))

    runner = GuardedRunner(app, header_timeout_s=header_timeout_s, max_header_bytes=max_header_bytes, refused=refused)
    await runner.setup()
    try:
        sock = socket.create_server(("127.0.0.1", 0))
        site = GuardedSite(runner, sock, handshake_timeout_s=header_timeout_s, ssl_context=ssl_context)
        await site.start()
        assert runner.guarded is not None
        scheme = "http" if ssl_context is None else "https"
        server = Server(sock.getsockname()[1], runner.guarded, refusals, scheme)
        try:
            yield server
        finally:
            for raw in server.opened:
                await raw.close()
    finally:
        await runner.cleanup()


@asynccontextmanager
async def client(server: Server) -> AsyncIterator[aiohttp.ClientSession]:
    async with aiohttp.ClientSession(server.url) as session:
        yield session


@dataclass
class Answer:
    status: int
    headers: dict[str, str]
    body: bytes

    @property
    def error(self) -> dict[str, Any]:
        error: dict[str, Any] = json.loads(self.body)["error"]
        assert list(error) == ["message", "type", "param", "code"]
        return error


class Raw:
    """One connection, byte by byte."""

    def __init__(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.reader, self.writer = reader, writer

    @classmethod
    async def connect(cls, server: Server, context: ssl.SSLContext | None = None) -> Raw:
        name = None if context is None else "localhost"
        raw = cls(*await asyncio.open_connection("127.0.0.1", server.port, ssl=context, server_hostname=name))
        server.opened.append(raw)
        return raw

    async def send(self, *pieces: bytes) -> None:
        self.writer.writelines(pieces)
        await self.writer.drain()

    async def answer(self) -> Answer:
        """The next answer with a Content-Length."""
        head = (await asyncio.wait_for(self.reader.readuntil(b"\r\n\r\n"), 20)).decode()
        first, *lines = head.rstrip().split("\r\n")
        headers = {name.lower(): value for name, value in (line.split(": ", 1) for line in lines)}
        body = await asyncio.wait_for(self.reader.readexactly(int(headers["content-length"])), 20)
        return Answer(int(first.split()[1]), headers, body)

    async def closed(self) -> bool:
        """Waits for the server to close; nothing may come before it."""
        try:
            return await asyncio.wait_for(self.reader.read(), 20) == b""
        except ConnectionError:
            return True

    async def close(self) -> None:
        self.writer.close()
        with suppress(ConnectionError, ssl.SSLError):
            await self.writer.wait_closed()


def post(path: str, body: bytes, headers: Sequence[str] = ("Content-Type: application/json",)) -> bytes:
    lines = [f"POST {path} HTTP/1.1", "Host: x", f"Content-Length: {len(body)}", *headers]
    return "\r\n".join(lines).encode() + b"\r\n\r\n" + body


async def until(condition: Any, timeout_s: float = 20.0) -> None:
    async with asyncio.timeout(timeout_s):
        while not condition():  # noqa: ASYNC110 - a test polls
            await asyncio.sleep(0.005)
