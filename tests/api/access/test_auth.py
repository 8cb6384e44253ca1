from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import aiohttp
import pytest
from aiohttp import web

from server.api.access.admin import admin_routes
from server.api.access.auth import ANONYMOUS, CALLER, Caller, add_rate_limit_headers, auth_middleware, check_priority
from server.api.access.control import ACCESS, AccessControl
from server.api.access.keys import ApiKey, KeyTable
from server.api.access.keys import digest_of as digest
from server.api.errors import ApiError, error_middleware
from tests.api.access.live import client, serving
from tests.api.access.test_keys import ALICE, BOB, ROOT, block


def bearer(key: str) -> dict[str, str]:
    return {"Authorization": f"Bearer {key}"}


@pytest.fixture
def path(tmp_path: Path) -> Path:
    path = tmp_path / "keys.toml"
    path.write_text(f'[admin]\nsha256 = "{digest(ROOT)}"\n' + block("alice", ALICE, "requests_per_minute = 2"))
    return path


def replace(path: Path, text: str) -> None:
    path.write_text(text)


def text(path: Path) -> str:
    return path.read_text()


def make_app(access: AccessControl) -> web.Application:
    async def who(request: web.Request) -> web.Response:
        return web.json_response({"name": request[CALLER].name, "admin": request[CALLER].admin})

    async def reload() -> list[str]:
        problem = access.reload()
        return [] if problem is None else [problem]

    app = web.Application(middlewares=[error_middleware, auth_middleware])
    app[ACCESS] = access
    app.on_response_prepare.append(add_rate_limit_headers)
    routes = [web.get(path, who) for path in ("/", "/health", "/ready", "/version", "/openapi.json", "/metrics")]
    app.add_routes([*routes, *admin_routes(reload), web.get("/v1/models", who), web.post("/v1/completions", who)])
    return app


@asynccontextmanager
async def running(path: Path | None) -> AsyncIterator[aiohttp.ClientSession]:
    async with serving(make_app(AccessControl.from_file(path))) as server, client(server) as http:
        yield http


async def ask(
    http: aiohttp.ClientSession, url: str, headers: dict[str, str] | None = None, method: str = "GET"
) -> tuple[int, Any, dict[str, str]]:
    async with http.request(method, url, headers=headers) as response:
        payload = await response.json()
        headers = {name.lower(): value for name, value in response.headers.items()}
        return response.status, payload.get("error", payload), headers


async def test_a_key_opens_the_routes(path: Path) -> None:
    async with running(path) as http:
        for headers in (bearer(ALICE), {"Authorization": f"bearer  {ALICE} "}, {"api-key": ALICE}):
            assert (await ask(http, "/v1/models", headers))[:2] == (200, {"name": "alice", "admin": False})


async def test_no_key(path: Path) -> None:
    async with running(path) as http:
        for headers in (
            {},
            {"Authorization": "Basic abc"},
            {"Authorization": "Bearer "},
            {"api-key": " "},
            {"x-api-key": ALICE},
        ):
            status, error, answered = await ask(http, "/v1/models", headers)
            assert (status, error["type"], error["code"]) == (401, "invalid_request_error", "invalid_api_key")
            assert error["message"].startswith("You didn't provide an API key.")
            assert answered["www-authenticate"] == "Bearer"


async def test_a_wrong_key_is_never_shown_whole(path: Path) -> None:
    async with running(path) as http:
        for key in ("sk-wrong-0123456789abcdefghWXYZ", "short-key", ALICE[:-1] + "y"):
            status, error, answered = await ask(http, "/v1/models", bearer(key))
            assert (status, error["code"], answered["www-authenticate"]) == (401, "invalid_api_key", "Bearer")
            shown = key[-4:] if len(key) >= 20 else ""
            assert f"Incorrect API key provided: ****{shown}." in error["message"]
            assert key[:5] not in error["message"]


async def test_what_is_open_and_what_is_not(path: Path) -> None:
    async with running(path) as http:
        for url in ("/", "/health", "/ready", "/version", "/openapi.json", "/metrics"):
            assert (await ask(http, url))[:2] == (200, {"name": "", "admin": False})
            assert (await ask(http, url, bearer("wrong")))[0] == 200
        for url in ("/v1/models", "/admin/keys", "/nothing", "/health/", "/v1/completions"):
            assert (await ask(http, url))[0] == 401, url
        assert (await ask(http, "/nothing", bearer(ALICE)))[0] == 404
        assert (await ask(http, "/health", method="DELETE"))[0] == 401


async def test_admin_and_users_keep_apart(path: Path) -> None:
    async with running(path) as http:
        status, error, _ = await ask(http, "/admin/keys", bearer(ALICE))
        assert (status, error["code"]) == (403, "insufficient_permissions")
        assert "'alice' is a user key" in error["message"]
        status, error, _ = await ask(http, "/v1/models", bearer(ROOT))
        assert (status, error["code"]) == (403, "insufficient_permissions")
        assert "use a user key" in error["message"]


async def test_without_a_key_file_everybody_is_let_in_but_not_as_admin() -> None:
    async with running(None) as http:
        for headers in ({}, bearer("anything")):
            assert (await ask(http, "/v1/models", headers))[:2] == (200, {"name": "", "admin": False})
            status, error, _ = await ask(http, "/admin/keys", headers)
            assert (status, error["code"]) == (403, "insufficient_permissions") and "--api-keys" in error["message"]


async def test_posts_count_and_headers_tell(path: Path) -> None:
    async with running(path) as http:
        assert (await ask(http, "/v1/models", bearer(ALICE)))[2]["x-ratelimit-remaining-requests"] == "2"
        remaining = []
        for _ in range(2):
            status, _, headers = await ask(http, "/v1/completions", bearer(ALICE), "POST")
            remaining.append((status, headers["x-ratelimit-remaining-requests"]))
        assert remaining == [(200, "1"), (200, "0")]
        status, error, headers = await ask(http, "/v1/completions", bearer(ALICE), "POST")
        assert (status, error["type"], error["code"]) == (429, "requests", "rate_limit_exceeded")
        assert 1 <= int(headers["retry-after"]) <= 60
        assert headers["x-ratelimit-remaining-requests"] == "0"
        assert (await ask(http, "/v1/models", bearer(ALICE)))[0] == 200


async def test_the_admin_sees_names_limits_and_use_but_no_hashes(path: Path) -> None:
    async with running(path) as http:
        await ask(http, "/v1/completions", bearer(ALICE), "POST")
        async with http.get("/admin/keys", headers=bearer(ROOT)) as response:
            raw = await response.text()
            listed = await response.json()
        assert listed["data"] == [
            {
                "name": "alice",
                "requests_per_minute": 2,
                "tokens_per_minute": None,
                "best_priority": 0,
                "default_priority": 0,
                "speculation": True,
                "used": {"requests": 1, "tokens": 0},
            }
        ]
        assert digest(ALICE) not in raw and digest(ROOT) not in raw


async def test_keys_change_without_a_restart(path: Path, caplog: pytest.LogCaptureFixture) -> None:
    async with running(path) as http:
        await ask(http, "/v1/completions", bearer(ALICE), "POST")
        replace(path, block("bob", BOB) + text(path))
        assert (await ask(http, "/v1/models", bearer(BOB)))[0] == 401
        assert (await ask(http, "/admin/reload", bearer(ROOT), "POST"))[:2] == (200, {"status": "reloaded"})
        assert (await ask(http, "/v1/models", bearer(BOB)))[0] == 200
        assert (await ask(http, "/v1/models", bearer(ALICE)))[2]["x-ratelimit-remaining-requests"] == "1"
        replace(path, "nonsense")
        status, error, _ = await ask(http, "/admin/reload", bearer(ROOT), "POST")
        assert (status, error["code"]) == (500, "reload_failed") and "is no TOML" in error["message"]
        assert "the old ones stay" in caplog.text
        assert (await ask(http, "/v1/models", bearer(BOB)))[0] == 200
        replace(path, block("bob", BOB))
        assert (await ask(http, "/admin/reload", bearer(ALICE), "POST"))[0] == 403
        assert (await ask(http, "/admin/reload", bearer(ROOT), "POST"))[0] == 200
        assert (await ask(http, "/v1/models", bearer(ALICE)))[0] == 401
        assert (await ask(http, "/admin/keys", bearer(ROOT)))[0] == 401


def test_a_worker_is_handed_its_table(path: Path) -> None:
    owner, worker = AccessControl.from_file(path), AccessControl()
    assert worker.reload() is None and worker.table is None
    worker.install(owner.table)
    assert worker.table is not None and worker.table.find(ALICE) is not None


async def test_an_empty_table_lets_nobody_in() -> None:
    async with serving(make_app(AccessControl(KeyTable()))) as server, client(server) as http:
        assert (await ask(http, "/v1/models"))[0] == (await ask(http, "/v1/models", bearer(ALICE)))[0] == 401
        assert (await ask(http, "/health"))[0] == 200


def test_priorities() -> None:
    caller = Caller("alice", ApiKey("alice", "", best_priority=1, default_priority=3, speculation=False))
    assert (caller.tenant, caller.default_priority, caller.speculation) == ("alice", 3, False)
    assert [check_priority(caller, p) for p in (None, 1, 7)] == [3, 1, 7]
    with pytest.raises(ApiError, match="may not use priority 0; use 1 or a higher number") as caught:
        check_priority(caller, 0)
    assert (caught.value.status, caught.value.param) == (403, "priority")
    assert (ANONYMOUS.tenant, ANONYMOUS.speculation) == ("", True)
    assert [check_priority(ANONYMOUS, p) for p in (None, -5)] == [0, -5]
