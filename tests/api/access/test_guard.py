from __future__ import annotations

import asyncio
import ssl
import time
from collections.abc import Awaitable, Callable, Coroutine
from typing import Any

import pytest
import trustme
import uvloop
from aiohttp import web

from server.api.access.body import read_body
from server.api.errors import error_middleware
from tests.api.access.live import Raw, Server, post, serving

Test = Callable[[Server], Awaitable[None]]
Run = Callable[..., None]
GET = b"GET /slow HTTP/1.1\r\nHost: x\r\n\r\n"


def make_app() -> web.Application:
    async def slow(request: web.Request) -> web.Response:
        await asyncio.sleep(float(request.query.get("s", "0")))
        return web.Response(text="slow")

    async def echo(request: web.Request) -> web.Response:
        return web.Response(body=await read_body(request, 100_000, 20.0))

    app = web.Application(middlewares=[error_middleware])
    app.add_routes([web.get("/slow", slow), web.post("/echo", echo)])
    return app


@pytest.fixture(params=[asyncio.new_event_loop, uvloop.new_event_loop], ids=["asyncio", "uvloop"])
def run(request: pytest.FixtureRequest) -> Run:
    """Runs a coroutine against a server on each event loop."""

    def runs(test: Test, **options: Any) -> None:
        async def main() -> None:
            async with serving(make_app(), **options) as server:
                await test(server)

        coroutine: Coroutine[Any, Any, None] = main()
        with asyncio.Runner(loop_factory=request.param) as runner:
            runner.run(coroutine)

    return runs


def test_a_head_that_drips_is_refused_in_time(run: Run) -> None:
    async def test(server: Server) -> None:
        raw = await Raw.connect(server)
        start = time.monotonic()

        async def drip() -> None:
            for byte in b"GET /slow HTTP/1.1\r\nX-Long: " + b"a" * 10_000:
                await raw.send(bytes([byte]))
                await asyncio.sleep(0.02)

        dripping = asyncio.create_task(drip())
        answer = await raw.answer()
        took_s = time.monotonic() - start
        assert 0.4 < took_s < 5
        assert (answer.status, answer.headers["connection"]) == (408, "close")
        assert answer.error["code"] == "request_timeout" and "0.5 s" in answer.error["message"]
        assert answer.headers["x-request-id"].startswith("req-")
        assert await raw.closed()
        dripping.cancel()
        assert server.guard.num_head_timeouts == 1
        assert server.refusals == [("127.0.0.1", 408, answer.headers["x-request-id"], "request_timeout")]

    run(test, header_timeout_s=0.5)


def test_a_connection_that_says_nothing_is_refused_too(run: Run) -> None:
    async def test(server: Server) -> None:
        raw = await Raw.connect(server)
        assert (await raw.answer()).status == 408
        assert await raw.closed()

    run(test, header_timeout_s=0.2)


def test_an_idle_connection_is_kept_and_its_next_head_has_the_same_time(run: Run) -> None:
    async def test(server: Server) -> None:
        raw = await Raw.connect(server)
        for _ in range(3):
            await raw.send(GET)
            assert (await raw.answer()).status == 200
            await asyncio.sleep(0.8)  # longer than a head may take
        await raw.send(b"GET /sl")
        await asyncio.sleep(0.1)
        await raw.send(GET[7:])
        assert (await raw.answer()).status == 200
        await raw.send(b"G")
        assert (await raw.answer()).status == 408
        assert await raw.closed()
        assert server.guard.num_head_timeouts == 1

    run(test, header_timeout_s=0.5)


def test_a_running_request_is_not_the_heads_business(run: Run) -> None:
    async def test(server: Server) -> None:
        raw = await Raw.connect(server)
        await raw.send(b"GET /slow?s=0.8 HTTP/1.1\r\nHost: x\r\n\r\n")
        assert (await raw.answer()).status == 200

    run(test, header_timeout_s=0.3)


def test_a_slow_body_is_not_the_heads_business(run: Run) -> None:
    async def test(server: Server) -> None:
        raw = await Raw.connect(server)
        request = post("/echo", b"x" * 8)
        await raw.send(request[:-8])
        for _ in range(8):
            await asyncio.sleep(0.1)
            await raw.send(b"x")
        answer = await raw.answer()
        assert (answer.status, answer.body) == (200, b"x" * 8)

    run(test, header_timeout_s=0.3)


def test_a_partial_head_behind_a_running_request_is_refused_after_its_answer(run: Run) -> None:
    async def test(server: Server) -> None:
        raw = await Raw.connect(server)
        await raw.send(b"GET /slow?s=0.6 HTTP/1.1\r\nHost: x\r\n\r\n")
        await asyncio.sleep(0.1)
        await raw.send(b"GET /sl")
        answer = await raw.answer()
        assert (answer.status, answer.body) == (200, b"slow")
        assert (await raw.answer()).status == 408
        assert await raw.closed()

    run(test, header_timeout_s=0.3)


def test_pipelined_requests_are_answered_in_order(run: Run) -> None:
    async def test(server: Server) -> None:
        raw = await Raw.connect(server)
        await raw.send(GET * 3 + post("/echo", b"abc") + GET)
        assert [(await raw.answer()).body for _ in range(5)] == [b"slow", b"slow", b"slow", b"abc", b"slow"]
        await asyncio.sleep(0.5)
        await raw.send(GET)
        assert (await raw.answer()).status == 200

    run(test, header_timeout_s=0.3)


@pytest.mark.parametrize(
    ("sent", "status", "code", "message"),
    [
        (b"GET /slow\r\n\r\n", 400, "invalid_http", "HTTP/0.9 is not spoken here; use HTTP/1.1."),
        (b"CONNECT \r\n\r\n", 400, "invalid_http", "HTTP/0.9 is not spoken here"),
        (b"GET /slow HTTP/2.0\r\nHost: x\r\n\r\n", 400, "invalid_http", "HTTP/2.0 is not spoken here"),
        (b"GET /slow HTTP/1.1\r\nHost: x\r\nExpect: more\r\n\r\n", 417, "invalid_http", "use 100-continue"),
        (b"GET /slow HTTP/1.1\r\nHost: x\r\nExpect: \xd5\r\n\r\n", 417, "invalid_http", "use 100-continue"),
        (b"\x00\xff\xfe garbage\r\n\r\n", 400, "invalid_http", "not valid HTTP: "),
        (b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03", 400, "invalid_http", "use http://"),
        (b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n", 400, "invalid_http", "not valid HTTP: "),
        (b"GET / HTTP/1.1\r\nNo colon\r\n\r\n", 400, "invalid_http", "not valid HTTP: "),
        (b"GET / HTTP/1.1\r\n\r\n", 400, "invalid_http", "Host"),
        (b"GET / HTTP/1.1\r\nHost: x\r\nContent-Length: -1\r\n\r\n", 400, "invalid_http", "Content-Length"),
        (
            b"POST /echo HTTP/1.1\r\nHost: x\r\nContent-Length: 3\r\nTransfer-Encoding: chunked\r\n\r\n",
            400,
            "invalid_http",
            "Transfer-Encoding",
        ),
        (b"GET / HTTP/1.1\r\nHost: x\r\nX-Big: " + b"a" * 3000 + b"\r\n\r\n", 431, "request_headers_too_large", "2000"),
        (b"GET /" + b"a" * 3000 + b" HTTP/1.1\r\nHost: x\r\n\r\n", 431, "request_headers_too_large", "2000"),
        (
            b"GET / HTTP/1.1\r\nHost: x\r\n" + b"X-Y: z\r\n" * 500 + b"\r\n",
            431,
            "request_headers_too_large",
            "too many headers",
        ),
    ],
    ids=[
        "0.9",
        "connect",
        "2.0",
        "expect",
        "surrogate",
        "bytes",
        "tls",
        "http2",
        "header",
        "host",
        "length",
        "smuggling",
        "field",
        "line",
        "many",
    ],
)
def test_what_is_no_http_is_told_so(
    run: Run, sent: bytes, status: int, code: str, message: str, caplog: pytest.LogCaptureFixture
) -> None:
    async def test(server: Server) -> None:
        raw = await Raw.connect(server)
        await raw.send(sent)
        answer = await raw.answer()
        assert (answer.status, answer.error["code"]) == (status, code)
        assert message in answer.error["message"] and "\n" not in answer.error["message"]
        assert answer.headers["content-type"].startswith("application/json")
        assert await raw.closed()
        assert server.guard.num_bad_requests == 1
        assert server.refusals == [("127.0.0.1", status, answer.headers["x-request-id"], code)]

    run(test, max_header_bytes=2000)
    assert not caplog.records


@pytest.mark.parametrize("chunk", [b"zz\r\nabc\r\n", b"3\r\nabcdef\r\n"])
def test_a_body_that_is_not_properly_chunked(run: Run, chunk: bytes, caplog: pytest.LogCaptureFixture) -> None:
    async def test(server: Server) -> None:
        raw = await Raw.connect(server)
        head = b"POST /echo HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\nTransfer-Encoding: chunked\r\n\r\n"
        await raw.send(head)
        await asyncio.sleep(0.05)
        await raw.send(b"3\r\nabc\r\n")
        await asyncio.sleep(0.05)
        await raw.send(chunk)
        answer = await raw.answer()
        assert (answer.status, answer.error["code"]) == (400, "invalid_body")
        assert await raw.closed()

    run(test)
    assert not caplog.records


def test_what_fails_outside_the_middlewares_has_the_same_shape(run: Run, caplog: pytest.LogCaptureFixture) -> None:
    async def fail(request: web.BaseRequest) -> web.StreamResponse:
        raise RuntimeError("outside")

    async def test(server: Server) -> None:
        server.guard._inner.request_handler = fail
        raw = await Raw.connect(server)
        await raw.send(GET)
        answer = await raw.answer()
        assert (answer.status, answer.error["type"], answer.error["code"]) == (500, "server_error", None)
        assert await raw.closed()
        assert server.refusals == []

    run(test)
    assert "error outside the middlewares" in caplog.text


def test_a_head_that_aiohttp_fails_on_leaves_no_open_connection(run: Run) -> None:
    async def test(server: Server) -> None:
        make = server.guard._inner.request_factory
        answered: list[bool] = []

        def fail_once(*arguments: Any) -> web.BaseRequest:
            if not answered:
                answered.append(True)
                raise ValueError
            return make(*arguments)

        server.guard._inner.request_factory = fail_once
        raw = await Raw.connect(server)
        await raw.send(GET)
        answer = await raw.answer()
        assert (answer.status, answer.error["code"]) == (400, "invalid_http")
        assert await raw.closed()

    run(test)


def test_an_answer_that_breaks_off_is_not_followed_by_another(run: Run) -> None:
    async def fail(request: web.BaseRequest) -> web.StreamResponse:
        response = web.Response(body=b"x" * 100)
        await response.prepare(request)
        await response.write(b"x")
        raise RuntimeError("outside")

    async def test(server: Server) -> None:
        server.guard._inner.request_handler = fail
        raw = await Raw.connect(server)
        await raw.send(GET)
        assert b"HTTP/1.1" not in (await asyncio.wait_for(raw.reader.read(), 20))[8:]

    run(test)


def test_the_client_may_ask_before_it_sends_a_body(run: Run) -> None:
    async def test(server: Server) -> None:
        raw = await Raw.connect(server)
        request = post("/echo", b"abc", ["Content-Type: application/json", "Expect: 100-Continue"])
        await raw.send(request[:-3])
        assert await raw.reader.readuntil(b"\r\n\r\n") == b"HTTP/1.1 100 Continue\r\n\r\n"
        await raw.send(request[-3:])
        assert (await raw.answer()).body == b"abc"

    run(test)


def test_the_same_through_tls(run: Run) -> None:
    authority = trustme.CA()
    inside, outside = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER), ssl.create_default_context()
    authority.issue_cert("localhost").configure_cert(inside)
    authority.configure_trust(outside)

    async def test(server: Server) -> None:
        raw = await Raw.connect(server, outside)
        await raw.send(GET)
        assert (await raw.answer()).status == 200
        await raw.send(b"GET")
        assert (await raw.answer()).status == 408
        assert await raw.closed()
        silent = await Raw.connect(server)  # no handshake at all
        assert await silent.closed()

    run(test, header_timeout_s=0.5, ssl_context=inside)
