from __future__ import annotations

import asyncio
import sys
from collections.abc import Callable
from typing import Any

import pytest

from server.api.successor import EngineRelay, Successor, succeeding
from server.config import EngineConfig
from server.core import FinishReason, Request, SamplingParams, StepOutput
from server.engine.errors import EngineUnavailable
from server.engine.messages import EngineStats


class FakeEngine:
    """Remembers what it was told; requests end when `finish` says so."""

    def __init__(self, failure: str | None = None) -> None:
        self.failure, self.ready = failure, False
        self.on_stats: Callable[[EngineStats], None] | None = None
        self.info: Any = object()
        self.pid: int | None = None
        self.stats, self.num_restarts = EngineStats(), 2
        self.sinks: dict[str, Any] = {}
        self.told: list[str] = []
        self.idle = asyncio.Event()
        self.idle.set()

    async def start(self) -> None:
        self.told.append("start")

    async def wait_ready(self) -> Any:
        if self.failure is not None:
            raise EngineUnavailable(self.failure)
        self.ready = True
        return self.info

    def submit(self, request: Request, sink: Any) -> None:
        self.sinks[request.request_id] = sink
        self.idle.clear()

    def finish(self, request_id: str, reason: FinishReason | None = FinishReason.LENGTH) -> None:
        self.sinks[request_id].put(StepOutput(request_id, [1], finish_reason=reason))
        if reason is not None:
            del self.sinks[request_id]
            self.idle.set()

    def abort(self, request_id: str) -> None:
        self.told.append(f"abort {request_id}")

    def hold(self, request_id: str) -> None:
        self.told.append(f"hold {request_id}")

    def resume(self, request_id: str) -> None:
        self.told.append(f"resume {request_id}")

    async def drain(self, timeout_s: float) -> None:
        await self.idle.wait()

    async def close(self) -> None:
        self.told.append("close")


class Sink:
    def __init__(self) -> None:
        self.got: list[Any] = []

    def started(self) -> None:
        pass

    def put(self, output: StepOutput) -> None:
        self.got.append(output)

    def fail(self, error: EngineUnavailable) -> None:
        self.got.append(error)


def request(name: str) -> Request:
    return Request(name, [1], SamplingParams())


async def test_running_requests_end_where_they_began_and_new_ones_go_to_the_successor() -> None:
    old, new = FakeEngine(), FakeEngine()
    relay, sinks = EngineRelay(old), [Sink(), Sink()]
    await relay.start()
    await relay.wait_ready()
    relay.on_stats = lambda stats: None
    relay.submit(request("a"), sinks[0])
    moving = asyncio.create_task(relay.replace(new))
    await asyncio.sleep(0.01)
    relay.submit(request("b"), sinks[1])
    assert list(old.sinks) == ["a"] and list(new.sinks) == ["b"]
    relay.hold("a")
    relay.hold("b")
    assert old.told[-1] == "hold a" and new.told[-1] == "hold b"
    assert "close" not in old.told
    assert [engine.on_stats is None for engine in (old, new)] == [True, False]
    old.finish("a", None)
    old.finish("a")
    await asyncio.wait_for(moving, 5)
    assert old.told[-1] == "close" and len(sinks[0].got) == 2
    assert relay.num_restarts == 4
    relay.abort("b")
    assert new.told[-1] == "abort b"


async def test_a_successor_that_does_not_start_changes_nothing() -> None:
    old, new = FakeEngine(), FakeEngine("no memory")
    relay = EngineRelay(old)
    await relay.wait_ready()
    with pytest.raises(EngineUnavailable, match="no memory"):
        await relay.replace(new)
    assert new.told[-1] == "close" and relay.info is old.info and "close" not in old.told


@pytest.mark.parametrize("status", [0, 3])
async def test_the_command_decides(status: int) -> None:
    old, new, said = FakeEngine(), FakeEngine(), []
    relay = EngineRelay(old)
    words = "print('outpace optimize: no room', file=sys.stderr)"
    program = f"import sys; {words}; print('noise'); print('/made/here'); raise SystemExit({status})"
    models: list[str] = []
    ended = asyncio.Event()

    def say(text: str) -> None:
        said.append(text)
        if "serve" in text or "goes on" in text:
            ended.set()

    def client(config: EngineConfig) -> Any:
        models.append(config.model)
        return new

    successor = Successor([sys.executable, "-c", program], lambda directory: EngineConfig(model=directory))
    async with asyncio.timeout(20), succeeding(relay, successor, client, say):
        await ended.wait()
    if status == 0:
        assert models == ["/made/here"] and relay.info is new.info and old.told[-1] == "close"
    else:
        assert models == [] and "could not be made: no room" in said[0] and relay.info is old.info


async def test_leaving_ends_the_command() -> None:
    relay = EngineRelay(FakeEngine())
    successor = Successor([sys.executable, "-c", "import time; time.sleep(60)"], lambda d: EngineConfig(model=d))
    async with asyncio.timeout(20), succeeding(relay, successor, lambda config: FakeEngine(), print):
        await asyncio.sleep(0.2)
