"""The loop's messages, without a process: who hears what, and when it ends."""

from __future__ import annotations

import os
from collections import deque
from typing import Any

import msgspec
import pytest

from server.core import FinishReason, Request, StepOutput
from server.engine.kinds import ABORT, FRAME, HELLO, INFO, STOP, SUBMIT
from server.engine.loop import EngineLoop
from server.engine.messages import EngineFrame, EngineInfo
from tests.engine.tiny import engine, prompts, request

_MODEL_INFO = EngineInfo("m", "a", 1, "f", "cpu", 8, 8, 8, 8, 1, 8, "none", 0, "coupled", "torch", 1, 0.0)


class Socket:
    """What the clients sent, then nothing; `sent` is what they got."""

    def __init__(self) -> None:
        self.inbox: deque[list[bytes]] = deque()
        self.sent: list[tuple[bytes, bytes, Any]] = []
        self.polls = 0

    def put(self, identity: bytes, kind: bytes, payload: bytes = b"") -> None:
        self.inbox.append([identity, kind, payload])

    def poll(self, timeout: int) -> bool:
        self.polls += 1
        assert self.polls < 50, "the loop waits for ever"
        return bool(self.inbox)

    def receive(self) -> list[list[bytes]]:
        inbox = list(self.inbox)
        self.inbox.clear()
        return inbox

    def send(self, identity: bytes, kind: bytes, payload: bytes) -> None:
        decoded = msgspec.msgpack.decode(payload, type=EngineFrame if kind == FRAME else EngineInfo)
        self.sent.append((identity, kind, decoded))

    def outputs(self, identity: bytes) -> list[StepOutput]:
        return [o for to, kind, frame in self.sent if to == identity and kind == FRAME for o in frame.outputs]


@pytest.fixture
def socket() -> Socket:
    return Socket()


@pytest.fixture
def loop(model: Any, socket: Socket) -> EngineLoop:
    return EngineLoop(engine(model, max_num_seqs=2), _MODEL_INFO, socket, os.getppid())  # type: ignore[arg-type]


def submit(socket: Socket, identity: bytes, req: Request) -> None:
    socket.put(identity, SUBMIT, msgspec.msgpack.encode(req))


def turn(loop: EngineLoop, times: int = 1) -> None:
    """One round of `run`."""
    for _ in range(times):
        loop._receive()
        if loop.core.has_work:
            loop._send(loop.core.step())


def test_each_client_gets_its_own_and_the_last_stats(loop: EngineLoop, socket: Socket, greedy: Any) -> None:
    first, second = prompts(2)
    socket.put(b"a", HELLO)
    socket.put(b"b", HELLO)
    submit(socket, b"a", request("ra", first, 6))
    submit(socket, b"b", request("rb", second, 3))
    turn(loop)
    while loop.core.has_work:
        turn(loop)
    assert [(to, kind) for to, kind, _ in socket.sent[:3:2]] == [(b"a", INFO), (b"b", INFO)]
    assert socket.sent[1][2].stats.num_running == 0, "a new engine says at once that nothing runs or waits"
    assert [t for o in socket.outputs(b"a") for t in o.token_ids] == greedy(first, 6)
    assert [t for o in socket.outputs(b"b") for t in o.token_ids] == greedy(second, 3)
    last = {to: frame for to, kind, frame in socket.sent if kind == FRAME}
    for frame in last.values():
        assert (frame.stats.num_running, frame.stats.kv_blocks_used) == (0, 0), "everybody hears that it is quiet now"
    assert not loop._owner


def test_a_refusal_goes_back_to_its_sender(loop: EngineLoop, socket: Socket) -> None:
    submit(socket, b"a", request("bad", []))
    turn(loop)
    (output,) = socket.outputs(b"a")
    assert output.finish_reason is FinishReason.ERROR
    assert "empty" in str(output.error)
    assert not loop.core.has_work
    assert not loop._owner


def test_an_abort_frees_before_the_next_step(loop: EngineLoop, socket: Socket) -> None:
    socket.put(b"a", HELLO)
    submit(socket, b"a", request("r", prompts(1)[0], 60))
    turn(loop, 3)
    socket.put(b"a", ABORT, b"r")
    loop._receive()
    assert loop.core.stats().kv_blocks_used == 0
    assert socket.sent[-1][2].stats.num_running == 0
    assert socket.outputs(b"a")[-1].finish_reason is None, "nobody is left to hear of the end"


def test_an_abort_of_what_just_ended_is_nothing(loop: EngineLoop, socket: Socket) -> None:
    submit(socket, b"a", request("r", prompts(1)[0], 1))
    turn(loop, 2) if loop.core.has_work else turn(loop)
    count = len(socket.sent)
    socket.put(b"a", ABORT, b"r")
    loop._receive()
    assert len(socket.sent) == count


def test_submit_and_abort_in_one_batch_of_messages(loop: EngineLoop, socket: Socket) -> None:
    submit(socket, b"a", request("r", prompts(1)[0], 60))
    socket.put(b"a", ABORT, b"r")
    turn(loop)
    assert not loop.core.has_work
    assert socket.outputs(b"a") == []


def test_stop_ends_the_loop_in_the_middle_of_work(loop: EngineLoop, socket: Socket) -> None:
    submit(socket, b"a", request("r", prompts(1)[0], 60))
    socket.put(b"a", STOP)
    submit(socket, b"a", request("late", prompts(1)[0], 60))
    loop.run()
    assert list(loop.core.scheduler.by_id) == ["r"]


def test_an_unknown_message_is_an_error(loop: EngineLoop, socket: Socket) -> None:
    socket.put(b"a", b"hullo")
    with pytest.raises(ValueError, match="hullo"):
        turn(loop)


def test_an_orphan_stops(loop: EngineLoop, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("server.engine.loop.os.getppid", lambda: 1)
    loop._parent = 4711
    loop.run()


def test_a_leak_is_found_when_the_loop_idles(loop: EngineLoop, socket: Socket) -> None:
    loop.core.scheduler.pool.allocate()
    with pytest.raises(AssertionError, match="1 references, 0 owners"):
        loop.run()


def test_names_of_message_kinds_differ() -> None:
    assert len({HELLO, SUBMIT, ABORT, STOP, INFO, FRAME}) == 6
