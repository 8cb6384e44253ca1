"""The line to the engine, against a hub that plays the engine."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

import msgspec
import pytest

from server.core import FinishReason, Request, StepOutput
from server.engine import kinds
from server.engine.connection import MAX_TRIES, EngineConnection
from server.engine.errors import EngineUnavailable
from server.engine.messages import EngineFrame, EngineStats
from server.engine.wire import Hub


@dataclass
class Listener:
    outputs: list[StepOutput] = field(default_factory=list)
    errors: list[EngineUnavailable] = field(default_factory=list)

    num_started: int = 0

    def started(self) -> None:
        self.num_started += 1

    def put(self, output: StepOutput) -> None:
        self.outputs.append(output)

    def fail(self, error: EngineUnavailable) -> None:
        self.errors.append(error)


class Engine:
    """Several lives at endpoints of their own; `heard` is what arrived in the present one."""

    def __init__(self, directory: Path) -> None:
        self._directory = directory
        self._lives = 0
        self.heard: list[tuple[bytes, bytes]] = []
        self.identity = b""

    def live(self) -> str:
        path = str(self._directory / f"{self._lives}.sock")
        self._lives += 1
        self.hub = Hub(path)
        self.heard = []
        return path

    def send(self, frame: EngineFrame) -> None:
        self.hub.send(self.identity, kinds.FRAME, msgspec.msgpack.encode(frame))

    async def hears(self, kind: bytes, times: int = 1) -> list[bytes]:
        async with asyncio.timeout(10):
            while len(found := [payload for k, payload in self.heard if k == kind]) < times:
                await asyncio.sleep(0.001)
                for identity, heard_kind, payload in self.hub.receive():
                    self.identity = identity
                    self.heard.append((heard_kind, payload))
        return found


@pytest.fixture
def engine(tmp_path: Path) -> Iterator[Engine]:
    engine = Engine(tmp_path)
    yield engine
    engine.hub.close()


async def until(condition: object) -> None:
    async with asyncio.timeout(10):
        while not condition():  # type: ignore[operator]  # noqa: ASYNC110 - a test polls
            await asyncio.sleep(0.001)


async def test_only_what_has_not_started_is_sent_again(engine: Engine) -> None:
    line = EngineConnection(b"me")
    line.connect(engine.live())
    waiting, started, emitted = Listener(), Listener(), Listener()
    line.submit(Request("waiting", [1]), waiting)
    line.submit(Request("started", [2]), started)
    line.submit(Request("emitted", [3]), emitted)
    await engine.hears(kinds.SUBMIT, 3)
    engine.send(EngineFrame([StepOutput("emitted", [7])], EngineStats(num_running=2), ["started"]))
    await until(lambda: emitted.outputs)
    assert line.stats.num_running == 2
    line.disconnect("it died")
    assert line.stats.num_running == 0
    assert (waiting.num_started, started.num_started) == (0, 1)
    assert [str(e) for e in started.errors + emitted.errors] == ["it died"] * 2
    assert not waiting.errors
    engine.hub.close()
    line.connect(engine.live())
    (again,) = await engine.hears(kinds.SUBMIT)
    assert msgspec.msgpack.decode(again, type=Request) == Request("waiting", [1])
    engine.send(EngineFrame([StepOutput("waiting", [8], finish_reason=FinishReason.STOP)], EngineStats()))
    await until(lambda: waiting.outputs)
    assert line.num_in_flight == 0
    line.close()


async def test_a_request_that_no_engine_survives_is_given_up(engine: Engine) -> None:
    line, poison = EngineConnection(b"me"), Listener()
    line.connect(engine.live())
    line.submit(Request("poison", [1]), poison)
    for _ in range(MAX_TRIES - 1):
        await engine.hears(kinds.SUBMIT)
        line.disconnect("died")
        engine.hub.close()
        assert not poison.errors
        line.connect(engine.live())
    line.disconnect("died")
    assert len(poison.errors) == 1
    line.close()


async def test_an_engine_that_is_not_coming_back_fails_everything(engine: Engine) -> None:
    line, listener = EngineConnection(b"me"), Listener()
    line.connect(engine.live())
    line.submit(Request("r", [1]), listener)
    line.disconnect("gone for good", keep_waiting=False)
    assert [str(error) for error in listener.errors] == ["gone for good"]
    with pytest.raises(EngineUnavailable):
        line.submit(Request("r", [1]), listener)
    await line.wait_idle()
    line.close()


async def test_an_aborted_request_hears_no_more_and_the_engine_is_told_once(engine: Engine) -> None:
    line, listener = EngineConnection(b"me"), Listener()
    line.connect(engine.live())
    line.submit(Request("r", [1]), listener)
    line.hold("r")
    line.resume("r")
    line.abort("r")
    line.abort("r")
    line.hold("r")
    line.send(kinds.PING)
    await engine.hears(kinds.PING)
    kind_names = [kind for kind, _ in engine.heard]
    assert kind_names == [kinds.HELLO, kinds.SUBMIT, kinds.HOLD, kinds.RESUME, kinds.ABORT, kinds.PING]
    assert engine.identity == b"me"
    pongs: list[EngineStats] = []
    line.on_pong = pongs.append
    engine.send(EngineFrame([StepOutput("r", [1])], EngineStats()))
    engine.hub.send(b"me", kinds.PONG, msgspec.msgpack.encode(EngineStats(num_steps=3)))
    await until(lambda: pongs)
    assert pongs[0].num_steps == 3
    assert not listener.outputs
    line.close()


async def test_a_message_that_can_not_be_handled_is_told_once_and_ends_reading(engine: Engine) -> None:
    line = EngineConnection(b"me")
    errors: list[Exception] = []
    line.on_error = errors.append
    line.connect(engine.live())
    await engine.hears(kinds.HELLO)
    for _ in range(2):
        engine.hub.send(b"me", kinds.FRAME, b"no msgpack")
    await until(lambda: errors)
    await asyncio.sleep(0.05)
    assert len(errors) == 1
    line.close()


async def test_leaving_a_stream_aborts_its_request(engine: Engine) -> None:
    line = EngineConnection(b"me")
    line.connect(engine.live())
    stream = line.stream(Request("r", [1]))
    first = asyncio.ensure_future(anext(stream))
    await engine.hears(kinds.SUBMIT)
    engine.send(EngineFrame([StepOutput("r", [5])], EngineStats()))
    assert (await first).token_ids == [5]
    await stream.aclose()
    assert await engine.hears(kinds.ABORT) == [b"r"]
    line.close()
