"""A real server on loopback before a scripted engine."""

from __future__ import annotations

from collections.abc import AsyncIterator, Awaitable, Callable
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import aiohttp
import openai
import pytest

from server.api import sockets
from server.api.access.control import AccessControl
from server.api.arm import Arm
from server.api.arms import Arms
from server.api.front import Front
from server.api.params import Limits
from server.api.replays import compare_here
from server.api.state import ServerState
from server.config import CONTROL, EngineConfig, ServerConfig
from server.telemetry.metrics import Metrics
from server.telemetry.tracing import Tracing
from tests.api.fakes import ByteText, FakeEngine


@dataclass
class Live:
    """A running server: `client` talks OpenAI to it, `http` anything."""

    url: str
    engine: FakeEngine
    state: ServerState
    http: aiohttp.ClientSession

    @cached_property
    def client(self) -> openai.AsyncOpenAI:
        return openai.AsyncOpenAI(base_url=self.url + "/v1", api_key="none", max_retries=0)

    async def close(self) -> None:
        await self.http.close()
        if "client" in vars(self):
            await self.client.close()

    async def post(self, path: str, body: Any, **options: Any) -> tuple[int, Any]:
        async with self.http.post(self.url + path, json=body, **options) as response:
            return response.status, await response.json()

    async def get(self, path: str) -> tuple[int, Any]:
        async with self.http.get(self.url + path) as response:
            is_json = response.content_type == "application/json"
            return response.status, await (response.json() if is_json else response.text())

    async def chat(self, **fields: Any) -> tuple[int, Any]:
        return await self.post("/v1/chat/completions", {"messages": [{"role": "user", "content": "Hi"}], **fields})

    async def complete(self, **fields: Any) -> tuple[int, Any]:
        return await self.post("/v1/completions", {"prompt": "Hi", **fields})


Serve = Callable[..., Awaitable[Live]]


@pytest.fixture
async def serve() -> AsyncIterator[Serve]:
    """Starts a server on any free port. `server` are settings of ServerConfig, other keywords those of EngineConfig.

    `others` are the engines of further arms.
    """
    closers: list[Callable[[], Awaitable[None]]] = []

    async def start(
        engine: FakeEngine | None = None,
        *,
        ready: bool = True,
        limits: Limits | None = None,
        server: dict[str, Any] | None = None,
        others: dict[str, FakeEngine] | None = None,
        tracing: Tracing | None = None,
        **config: Any,
    ) -> Live:
        engine = engine or FakeEngine()
        settings = ServerConfig(
            engine=EngineConfig(model="fake-dir", **config), port=0, **{"access_log": "off"} | (server or {})
        )
        access = AccessControl.from_file(settings.api_keys)
        metrics = Metrics("1.2.3")
        engines = {CONTROL: engine, **(others or {})}
        arms = [Arm(name, settings.engine, one, "fake", metrics.clock) for name, one in engines.items()]
        state = ServerState(
            settings,
            Arms.of_config(settings, arms),
            metrics,
            "1.2.3",
            limits=limits or Limits(),
            access=access,
            tracing=tracing,
        )
        compare_here(state)
        front = Front(state)
        (listener,) = sockets.bind("127.0.0.1", 0)
        await front.listen([listener])
        if ready:
            for arm, one in zip(arms, engines.values(), strict=True):
                arm.text = ByteText()
                await one.wait_ready()
        live = Live(f"http://127.0.0.1:{sockets.port_of(listener)}", engine, state, aiohttp.ClientSession())
        if state.replays is not None:
            closers.append(state.replays.close)
        closers.extend([lambda: front.close(at_once=True), live.close])
        return live

    yield start
    for close in reversed(closers):
        await close()


@pytest.fixture
async def live(serve: Serve) -> Live:
    """The default server: every reply is `Hello world` in two steps."""
    return await serve()
