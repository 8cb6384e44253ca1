"""The fuzzer itself: it finds what it is there to find, and its cases can be repeated."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import replace
from pathlib import Path

import orjson
import pytest

from tests.fuzz import campaign
from tests.fuzz.answers import Answer, BadAnswerError, check_answer
from tests.fuzz.case import Case, Send
from tests.fuzz.client import play
from tests.fuzz.leaks import Holdings
from tests.fuzz.message import get
from tests.fuzz.raw import make_case

ASK = Case("a case", "test", (Send(get("/")),), ("GET",))
FINE = b"HTTP/1.1 200 OK\r\nContent-Type: application/json\r\nContent-Length: 2\r\n\r\n{}"


def body(status: int, data: bytes, kind: str = "application/json") -> bytes:
    head = f"HTTP/1.1 {status} X\r\nContent-Type: {kind}\r\nContent-Length: {len(data)}\r\n\r\n"
    return head.encode() + data


def error(**fields: object) -> bytes:
    return orjson.dumps({"error": {"message": "m", "type": "t", "param": None, "code": None, **fields}})


@asynccontextmanager
async def answering(answer: bytes, *, stays: bool = False) -> AsyncIterator[int]:
    """A server that gives this answer to whatever comes first, and its port."""
    hold = asyncio.Event()

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await reader.read(10)
        writer.write(answer)
        if stays:
            await hold.wait()
        writer.close()

    server = await asyncio.start_server(serve, "127.0.0.1", 0)
    async with server:
        yield server.sockets[0].getsockname()[1]
        hold.set()


@pytest.mark.parametrize(
    ("answer", "why"),
    [
        (b"", "closes the connection without an answer"),
        (b"HTTP/1.1 2", "head breaks off"),
        (b"hello\r\n\r\n", "no status line"),
        (b"HTTP/1.1 200 OK\r\nno colon\r\n\r\n", "no header line"),
        (FINE[:-1], "breaks off"),
        (b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n2\r\n{}", "breaks off"),
        (b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n1\r\n{}\r\n", "longer than it says"),
        (body(500, error()), "status 500"),
        (body(503, error()), "status 503"),
        (body(302, b""), "status 302"),
        (body(400, error(), "text/plain"), "as 'text/plain'"),
        (body(400, b'{"detail": "x"}'), "OpenAI's shape"),
        (body(400, error(extra=1)), "OpenAI's shape"),
        (body(400, error(code=3)), "wrong types"),
        (body(400, error(message="")), "wrong types"),
        (body(200, b"{"), "no JSON"),
        (body(200, b'{"a": NaN}'), "NaN"),
        (body(200, b"\xff", "text/plain"), "no UTF-8"),
        (body(200, b'data: {"choices": []}\n\n', "text/event-stream"), "OpenAI's shape"),
        (body(200, b"data: [DONE]", "text/event-stream"), "within an event"),
        (body(200, b"data: " + error() + b"\n\ndata: [DONE]\n\n", "text/event-stream"), "not at the end"),
        (body(200, b"", "text/event-stream"), "an empty stream"),
    ],
)
async def test_faults_are_found(answer: bytes, why: str) -> None:
    async with answering(answer) as port:
        with pytest.raises(BadAnswerError, match=why):
            await play(ASK, "127.0.0.1", port, 5)


@pytest.mark.parametrize(
    "answer",
    [
        FINE,
        b"HTTP/1.1 100 Continue\r\n\r\n" + FINE,
        body(429, error(code="rate_limit_exceeded")),
        body(200, b'data: {"choices": []}\n\ndata: [DONE]\n\n', "text/event-stream"),
        body(200, b'data: {"choices": []}\n\ndata: ' + error() + b"\n\n", "text/event-stream"),
    ],
)
async def test_what_is_right_passes(answer: bytes) -> None:
    async with answering(answer) as port:
        assert len(await play(ASK, "127.0.0.1", port, 5)) == 1


async def test_silence_is_a_fault_only_where_an_answer_is_due() -> None:
    async with answering(b"", stays=True) as port:
        with pytest.raises(BadAnswerError, match=r"no end within 0\.5 s"):
            await play(ASK, "127.0.0.1", port, 0.5)
        assert await play(replace(ASK, must_answer=False), "127.0.0.1", port, 5) == []


async def test_an_answer_that_has_begun_must_end() -> None:
    async with answering(FINE[:-1], stays=True) as port:
        with pytest.raises(BadAnswerError, match="no end within"):
            await play(replace(ASK, must_answer=False), "127.0.0.1", port, 0.5)


async def test_a_server_that_is_gone_is_a_fault() -> None:
    async with answering(b"") as port:
        pass
    with pytest.raises(BadAnswerError, match="takes no connection"):
        await play(ASK, "127.0.0.1", port, 5)


def test_a_head_request_has_no_body() -> None:
    check_answer(Answer(400, {"content-type": "text/plain"}, b""), "HEAD")


def test_cases_depend_on_seed_and_index_only() -> None:
    assert [make_case(3, 5), make_case(3, 6)] == [make_case(3, 5), make_case(3, 6)]
    assert len({make_case(seed, index).sends for seed in (1, 2) for index in range(50)}) > 95


def test_every_kind_of_case_turns_up() -> None:
    kinds = {make_case(1, index).kind for index in range(3000)}
    assert len(kinds) == 16


def test_a_saved_case_is_the_same_case(tmp_path: Path) -> None:
    for index in range(300):
        case = make_case(1, index)
        case.save(tmp_path / "case.json", "why")
        assert Case.load(tmp_path / "case.json") == case


def test_what_counts_as_left_behind() -> None:
    before = Holdings(True, {"num_running": 0}, 0, {"num_tasks": 5}, {10: 7, 11: 3})
    assert before.excess(before) == []
    assert replace(before, files={10: 6, 11: 3}, process={"num_tasks": 4}).excess(before) == []
    after = Holdings(False, {"num_running": 1, "num_held": 0}, 2, {"num_tasks": 6}, {10: 8, 12: 3})
    assert after.excess(before) == [
        "num_running is 1",
        "the server is not ready",
        "the engine was restarted 2 times",
        "processes were [10, 11] and are [10, 12]",
        "num_tasks was 5 and is 6",
        "process 10 had 7 open files and has 8",
    ]


def test_a_verdict_says_what_and_where(tmp_path: Path) -> None:
    verdict = campaign.Verdict(num_cases=2, seconds=1.0, faults=[(ASK, "it broke")], left=["num_held is 1"])
    assert not verdict.clean
    assert "FAULT    a case (test): it broke\nLEFT     num_held is 1\n1 faults, 1 leaks" in verdict.summary()
    [path] = campaign.save_faults(verdict, tmp_path)
    assert Case.load(path) == ASK
    assert campaign.Verdict(num_cases=1).clean
