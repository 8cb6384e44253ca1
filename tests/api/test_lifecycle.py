from __future__ import annotations

import asyncio
import os
import signal
import socket
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager

import aiohttp
import pytest

from server.api import lifecycle
from server.api.lifecycle import Backend, Server
from server.api.starting import StartError
from server.config import EngineConfig, ServerConfig
from tests.api.fakes import ByteText, FakeEngine, endless, steps


class Console(list[str]):
    def __call__(self, line: str) -> None:
        self.append(line)


def make(engine: FakeEngine, *, console: Console | None = None, **settings: object) -> Server:
    config = ServerConfig(engine=EngineConfig(model="fake-dir"), **{"port": 0, "access_log": "off", **settings})  # type: ignore[arg-type]
    return Server(
        config,
        [Backend(config.engine, engine, lambda: (ByteText(), "fake"))],
        "1.2.3",
        console if console is not None else Console(),
    )


@asynccontextmanager
async def running(server: Server) -> AsyncIterator[asyncio.Task[None]]:
    task = asyncio.create_task(server.run())
    try:
        await until(lambda: bool(server.url) or task.done())
        yield task
    finally:
        server.stop()
        server.stop()
        await asyncio.wait_for(asyncio.gather(task, return_exceptions=True), 10)


async def until(condition: Callable[[], bool]) -> None:
    async with asyncio.timeout(5):
        while not condition():  # noqa: ASYNC110 - a test polls
            await asyncio.sleep(0.002)


async def status_of(server: Server, path: str) -> int:
    async with aiohttp.ClientSession() as http, http.get(server.url + path) as response:
        return response.status


async def test_the_socket_answers_before_the_engine_is_up() -> None:
    engine, console = FakeEngine(), Console()
    engine.may_load.clear()
    server = make(engine, console=console)
    async with running(server):
        assert await status_of(server, "/health") == 200
        assert await status_of(server, "/ready") == 503
        engine.may_load.set()
        await until(lambda: len(console) == 2)
        assert await status_of(server, "/ready") == 200
    assert "Loading fake-dir" in console[0]
    assert "Serving fake (FakeForCausalLM, 135 M parameters, float32 on cpu, 2 threads" in console[1]
    assert "KV cache 4,096 tokens (1 MiB)" in console[1]
    assert "drafter suffix, up to 7 draft tokens (as many as pay), rule coupled" in console[1]
    assert f"curl -N {server.url}/v1/chat/completions" in console[1]
    assert engine.closed.is_set()


async def test_the_first_signal_drains() -> None:
    engine = FakeEngine(steps(*"abcdefgh"), step_s=0.03)
    server = make(engine)
    async with running(server) as task, aiohttp.ClientSession() as http:
        await until(lambda: server.state.not_ready is None)
        body = {"prompt": "a", "stream": True}
        async with http.post(server.url + "/v1/completions", json=body) as response:
            await response.content.readany()
            server.stop()
            assert await status_of(server, "/ready") == 503
            async with http.post(server.url + "/v1/completions", json=body) as refused:
                assert (refused.status, (await refused.json())["error"]["code"]) == (503, "shutting_down")
            assert (await response.read()).endswith(b"data: [DONE]\n\n")
        await asyncio.wait_for(task, 5)
    assert not engine.aborted


async def test_it_is_a_signal_that_stops_it() -> None:
    server = make(FakeEngine())
    async with running(server) as task:
        await until(lambda: server.state.not_ready is None)
        os.kill(os.getpid(), signal.SIGTERM)
        await asyncio.wait_for(task, 5)


async def test_an_engine_that_does_not_close_is_left_behind(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(lifecycle, "_ENGINE_CLOSE_S", 0.01)
    engine = FakeEngine()
    monkeypatch.setattr(engine, "close", asyncio.Event().wait)
    server = make(engine)
    async with running(server) as task:
        await until(lambda: server.state.not_ready is None)
        server.stop()
        await asyncio.wait_for(task, 5)
    assert "the engine did not close" in caplog.text


async def test_what_does_not_finish_in_time_is_told_so() -> None:
    engine = FakeEngine(endless, step_s=0.01)
    server = make(engine, drain_timeout_s=0.05)
    async with running(server) as task, aiohttp.ClientSession() as http:
        await until(lambda: server.state.not_ready is None)
        async with http.post(server.url + "/v1/completions", json={"prompt": "a", "stream": True}) as response:
            await response.content.readany()
            server.stop()
            assert b'"code":"engine_unavailable"' in await response.read()
        await asyncio.wait_for(task, 5)


async def test_the_second_signal_quits_at_once() -> None:
    engine = FakeEngine(endless, step_s=0.01)
    server = make(engine, drain_timeout_s=60)
    async with running(server) as task, aiohttp.ClientSession() as http:
        await until(lambda: server.state.not_ready is None)
        async with http.post(server.url + "/v1/completions", json={"prompt": "a", "stream": True}) as response:
            await response.content.readany()
            server.stop()
            await asyncio.sleep(0.05)
            assert not task.done()
            server.stop()
            await asyncio.wait_for(task, 5)


async def test_a_signal_while_loading_stops_too() -> None:
    engine = FakeEngine()
    engine.may_load.clear()
    server = make(engine)
    async with running(server) as task:
        server.stop()
        await asyncio.wait_for(task, 5)
    assert engine.closed.is_set()


async def test_an_engine_that_cannot_start_ends_the_server_with_its_reason() -> None:
    engine = FakeEngine()
    engine.failure = "no KV cache fits"
    with pytest.raises(StartError, match="the engine failed to start: no KV cache fits"):
        await make(engine).run()
    assert engine.closed.is_set()


async def test_a_model_that_cannot_be_read_ends_the_server_with_the_reason() -> None:
    def load() -> tuple[ByteText, str]:
        raise ValueError("nowhere: there is no such directory")

    engine = FakeEngine()
    config = ServerConfig(engine=EngineConfig(model="nowhere"), port=0, access_log="off")
    with pytest.raises(StartError, match="nowhere: there is no such directory"):
        await Server(config, [Backend(config.engine, engine, load)], "1", Console()).run()
    assert engine.closed.is_set()


async def test_a_busy_port_is_one_clear_line_and_no_engine_starts() -> None:
    engine = FakeEngine()
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        with pytest.raises(StartError, match=rf"^port {port} on 127\.0\.0\.1 is in use; choose another with --port"):
            await make(engine, port=port).run()
    assert not engine.started


async def test_a_host_that_is_not_ours() -> None:
    with pytest.raises(StartError, match=r"^cannot listen on no\.such\.host\.invalid:0: "):
        await make(FakeEngine(), host="no.such.host.invalid").run()
