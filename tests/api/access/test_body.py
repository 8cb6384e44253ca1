from __future__ import annotations

import asyncio
import gzip
import time
from collections.abc import AsyncIterator

import pytest
from aiohttp import web

from server.api.access.body import read_body
from server.api.errors import error_middleware
from tests.api.access.live import Raw, Server, post, serving

LIMIT = 1000
JSON = "Content-Type: application/json"
CHUNKED = f"POST / HTTP/1.1\r\nHost: x\r\n{JSON}\r\nTransfer-Encoding: chunked\r\n\r\n".encode()
OTHERS = ("Content-Type: text/plain", "Content-Type: application/jsonx", "X-No: type", "Content-Type: ")


@pytest.fixture
async def server() -> AsyncIterator[Server]:
    async def echo(request: web.Request) -> web.Response:
        return web.Response(body=await read_body(request, LIMIT, 0.5))

    app = web.Application(middlewares=[error_middleware], client_max_size=10)  # aiohttp's own limit has no say
    app.add_routes([web.post("/", echo)])
    async with serving(app) as server:
        yield server


@pytest.mark.parametrize("content_type", [JSON, "content-type: Application/JSON; charset=utf-8"])
async def test_a_body_up_to_the_limit(server: Server, content_type: str) -> None:
    raw = await Raw.connect(server)
    for size in (0, 1, LIMIT):
        await raw.send(post("/", b"x" * size, [content_type]))
        answer = await raw.answer()
        assert (answer.status, answer.body) == (200, b"x" * size)


async def test_a_chunked_body(server: Server) -> None:
    raw = await Raw.connect(server)
    await raw.send(
        b"POST / HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\nTransfer-Encoding: chunked\r\n\r\n"
    )
    for chunk in (b"3\r\nabc\r\n", b"2\r\nde\r\n", b"0\r\n\r\n"):
        await asyncio.sleep(0.02)
        await raw.send(chunk)
    assert (await raw.answer()).body == b"abcde"


async def test_a_content_length_beyond_the_limit_is_refused_unread(server: Server) -> None:
    raw = await Raw.connect(server)
    start = time.monotonic()
    await raw.send(post("/", b"x" * (LIMIT + 1))[: -LIMIT - 1])
    answer = await raw.answer()
    assert time.monotonic() - start < 0.4  # nothing of the body was waited for
    assert (answer.status, answer.error["code"], answer.headers["connection"]) == (413, "request_too_large", "close")
    assert "larger than the 1000 bytes" in answer.error["message"]
    assert await raw.closed()


async def test_a_chunked_body_is_refused_as_soon_as_it_is_too_long(server: Server) -> None:
    raw = await Raw.connect(server)
    await raw.send(
        b"POST / HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\nTransfer-Encoding: chunked\r\n\r\n"
    )
    await raw.send(b"400\r\n" + b"x" * 0x400 + b"\r\n")
    answer = await raw.answer()
    assert (answer.status, answer.error["code"]) == (413, "request_too_large")
    assert await raw.closed()


async def test_a_compressed_body_counts_as_what_it_becomes(server: Server) -> None:
    raw = await Raw.connect(server)
    await raw.send(post("/", gzip.compress(b"x" * LIMIT), [JSON, "Content-Encoding: gzip"]))
    assert (await raw.answer()).body == b"x" * LIMIT
    bomb = gzip.compress(b"x" * 10**6)
    await raw.send(post("/", bomb[:LIMIT], [JSON, "Content-Encoding: gzip"]))
    assert (await raw.answer()).status == 413


async def test_compression_that_is_broken(server: Server, caplog: pytest.LogCaptureFixture) -> None:
    raw = await Raw.connect(server)
    await raw.send(post("/", b"no gzip at all", [JSON, "Content-Encoding: gzip"]))
    answer = await raw.answer()
    assert (answer.status, answer.error["code"]) == (400, "invalid_body")
    assert await raw.closed()
    assert not caplog.records


async def test_bytes_that_drip_gain_no_time(server: Server) -> None:
    raw = await Raw.connect(server)
    start = time.monotonic()
    await raw.send(post("/", b"x" * 900)[:-900])

    async def drip() -> None:
        for _ in range(800):
            await raw.send(b"x")
            await asyncio.sleep(0.02)

    dripping = asyncio.create_task(drip())
    answer = await raw.answer()
    assert 0.4 < time.monotonic() - start < 5
    dripping.cancel()
    assert (answer.status, answer.error["code"], answer.headers["connection"]) == (408, "request_timeout", "close")
    assert "within 0.5 s" in answer.error["message"]
    assert await raw.closed()


@pytest.mark.parametrize("header", OTHERS)
async def test_other_content_types(server: Server, header: str) -> None:
    raw = await Raw.connect(server)
    await raw.send(post("/", b"{}", [header]))
    answer = await raw.answer()
    assert (answer.status, answer.error["code"]) == (415, "unsupported_media_type")
    assert "use application/json" in answer.error["message"]
    await raw.send(post("/", b"{}"))
    assert (await raw.answer()).body == b"{}"
