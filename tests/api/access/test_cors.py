from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

import aiohttp
import pytest
from aiohttp import web

from server.api.access.auth import add_rate_limit_headers, auth_middleware
from server.api.access.control import ACCESS, AccessControl
from server.api.access.cors import Cors, parse_origins
from server.api.errors import error_middleware
from tests.api.access.live import client, serving
from tests.api.access.test_keys import ALICE, block

ORIGIN = "https://app.example"
PREFLIGHT = {
    "Origin": ORIGIN,
    "Access-Control-Request-Method": "POST",
    "Access-Control-Request-Headers": "authorization,content-type,x-stainless-os",
}


async def stream(request: web.Request) -> web.StreamResponse:
    response = web.StreamResponse()
    await response.prepare(request)
    await response.write(b"data")
    return response


@asynccontextmanager
async def running(tmp_path: Path, setting: str) -> AsyncIterator[aiohttp.ClientSession]:
    path = tmp_path / "keys.toml"
    path.write_text(block("alice", ALICE))
    cors = Cors(parse_origins(setting))
    app = web.Application(middlewares=[cors.middleware, error_middleware, auth_middleware])
    app[ACCESS] = AccessControl.from_file(path)
    app.on_response_prepare.extend([cors.add_headers, add_rate_limit_headers])
    app.add_routes([web.post("/stream", stream), web.options("/options", stream)])
    async with serving(app) as server, client(server) as http:
        yield http


def cors_headers(response: aiohttp.ClientResponse) -> dict[str, str]:
    return {
        name.lower(): value for name, value in response.headers.items() if name.lower().startswith("access-control")
    }


async def test_a_preflight_needs_no_key(tmp_path: Path) -> None:
    setting = f"http://localhost:3000, {ORIGIN}"
    async with running(tmp_path, setting) as http, http.options("/stream", headers=PREFLIGHT) as response:
        assert (response.status, await response.read()) == (204, b"")
        assert response.headers.getall("Vary") == ["Access-Control-Request-Headers, Origin"]
        assert cors_headers(response) == {
            "access-control-allow-origin": ORIGIN,
            "access-control-allow-methods": "GET, POST, OPTIONS",
            "access-control-allow-headers": "authorization,content-type,x-stainless-os",
            "access-control-max-age": "600",
            "access-control-expose-headers": cors_headers(response)["access-control-expose-headers"],
        }


async def test_streams_and_errors_carry_the_headers(tmp_path: Path) -> None:
    async with running(tmp_path, ORIGIN) as http:
        for headers, status in (({"Authorization": f"Bearer {ALICE}"}, 200), ({}, 401)):
            async with http.post("/stream", headers={"Origin": ORIGIN, **headers}) as response:
                assert response.status == status
                assert response.headers["Access-Control-Allow-Origin"] == ORIGIN
                assert response.headers["Vary"] == "Origin"
                exposed = response.headers["Access-Control-Expose-Headers"].split(", ")
                assert {"x-request-id", "retry-after", "x-ratelimit-remaining-tokens"} <= set(exposed)
                assert "Access-Control-Allow-Credentials" not in response.headers


@pytest.mark.parametrize(
    "origin", ["https://evil.example", "https://app.example.evil", "http://app.example", "null", None]
)
async def test_others_are_told_nothing(tmp_path: Path, origin: str | None) -> None:
    async with running(tmp_path, ORIGIN) as http:
        headers = {} if origin is None else {"Origin": origin}
        for method, status in (("POST", 401), ("OPTIONS", 204)):
            asked = headers | ({"Access-Control-Request-Method": "POST"} if method == "OPTIONS" else {})
            async with http.request(method, "/stream", headers=asked) as response:
                assert (response.status, cors_headers(response)) == (status, {})
                assert "Origin" in response.headers["Vary"]


async def test_any_origin(tmp_path: Path) -> None:
    headers = {"Origin": "null", "Authorization": f"Bearer {ALICE}"}
    async with running(tmp_path, "*") as http, http.post("/stream", headers=headers) as response:
        assert response.headers["Access-Control-Allow-Origin"] == "*"
        assert "Vary" not in response.headers


async def test_options_that_is_no_preflight_is_an_ordinary_request(tmp_path: Path) -> None:
    headers = {"Origin": ORIGIN}
    async with running(tmp_path, ORIGIN) as http, http.options("/options", headers=headers) as response:
        assert response.status == 401


def test_origins() -> None:
    assert parse_origins(" https://A.example ,http://localhost:3000,") == {"https://a.example", "http://localhost:3000"}
    for wrong in ("app.example", "https://app.example/", "https://*.example", "://x", "https://"):
        with pytest.raises(ValueError, match=r"cors_origins: .* is not valid; use origins such as"):
            parse_origins(f"https://fine.example,{wrong}")
    with pytest.raises(ValueError, match="names no origin"):
        parse_origins(" , ")
