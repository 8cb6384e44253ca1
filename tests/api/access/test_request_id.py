from __future__ import annotations

import pytest
from aiohttp import web

from server.api.access.request_id import REQUEST_ID, add_request_id, request_id_middleware
from server.api.errors import error_middleware
from tests.api.access.live import client, serving


def make_app() -> web.Application:
    async def echo(request: web.Request) -> web.Response:
        return web.Response(text=request[REQUEST_ID])

    async def stream(request: web.Request) -> web.StreamResponse:
        response = web.StreamResponse()
        await response.prepare(request)
        return response

    async def fail(request: web.Request) -> web.Response:
        raise RuntimeError

    app = web.Application(middlewares=[request_id_middleware, error_middleware])
    app.on_response_prepare.append(add_request_id)
    app.add_routes([web.get("/echo", echo), web.get("/stream", stream), web.get("/fail", fail)])
    return app


async def sent_back(given: str) -> str:
    headers = {"X-Request-Id": given}
    async with serving(make_app()) as server, client(server) as http, http.get("/echo", headers=headers) as response:
        request_id = response.headers["x-request-id"]
        assert request_id == await response.text()
        return request_id


@pytest.mark.parametrize("given", ["a", "req-12:34.5_6", "X" * 128])
async def test_a_plain_id_is_taken_over(given: str) -> None:
    assert await sent_back(given) == given


@pytest.mark.parametrize("given", ["", "a b", "é", "X" * 129, '"', "a\\nb", "{}"])
async def test_any_other_is_replaced(given: str) -> None:
    made = await sent_back(given)
    assert made.startswith("req-") and made != given


async def test_every_answer_has_its_own(caplog: pytest.LogCaptureFixture) -> None:
    seen = set()
    async with serving(make_app()) as server, client(server) as http:
        for url in ("/echo", "/echo", "/stream", "/fail", "/nothing"):
            async with http.get(url) as response:
                seen.add(response.headers["x-request-id"])
    assert len(seen) == 5
