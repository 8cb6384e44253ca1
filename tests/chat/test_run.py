"""`outpace chat` in a pipe, and what it says when things go wrong."""

from __future__ import annotations

import asyncio
import signal
import socket
import sys
from asyncio.subprocess import PIPE
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

import pytest

from tests.api.conftest import Serve
from tests.api.fakes import FakeEngine, endless, failing, steps
from tests.chat.terminal import PATIENCE_S, ROOT, environment

HEADERS = b"HTTP/1.1 200 OK\r\nConnection: close\r\n\r\n"
MODELS = HEADERS + b'{"object": "list", "data": [{"id": "fake"}]}'


@asynccontextmanager
async def running(home: Path, *arguments: str, **variables: str) -> AsyncIterator[asyncio.subprocess.Process]:
    process = await asyncio.create_subprocess_exec(
        *(sys.executable, "-m", "server", "chat", *arguments),
        stdin=PIPE,
        stdout=PIPE,
        stderr=PIPE,
        cwd=ROOT,
        env=environment(home, **variables),
    )
    try:
        yield process
    finally:
        if process.returncode is None:
            process.kill()
            await process.wait()


async def pipe(home: Path, text: str, *arguments: str, **variables: str) -> tuple[int | None, str, str]:
    """Exit status, what it printed, what it complained about."""
    async with running(home, *arguments, **variables) as process, asyncio.timeout(PATIENCE_S):
        out, err = await process.communicate(text.encode())
        return process.returncode, out.decode(), err.decode()


@asynccontextmanager
async def answering(*answers: bytes) -> AsyncIterator[tuple[str, list[bytes]]]:
    """A server that gives these answers, one a connection, and keeps the heads of what it was asked."""
    heads: list[bytes] = []
    left = list(answers)

    async def answer(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        heads.append(await reader.readuntil(b"\r\n\r\n"))
        writer.write(left.pop(0))
        await writer.drain()
        writer.close()

    server = await asyncio.start_server(answer, "127.0.0.1", 0)
    async with server:
        yield f"http://127.0.0.1:{server.sockets[0].getsockname()[1]}", heads


async def test_it_answers_what_was_piped_in_and_prints_nothing_else(serve: Serve, tmp_path: Path) -> None:
    live = await serve(FakeEngine(steps("Hello\n", "wörld")))
    assert await pipe(tmp_path, "Hi\nthere\n", live.url) == (0, "Hello\nwörld\n", "")
    assert bytes(live.engine.requests[0].prompt_ids[1:]) == b"user:Hi\nthere\n"


async def test_nothing_is_asked_where_nothing_was_piped_in(serve: Serve, tmp_path: Path) -> None:
    live = await serve()
    status, out, err = await pipe(tmp_path, " \n", live.url)
    assert (status, out) == (2, "")
    assert err == "outpace chat: standard input: it is empty; pipe a message in, or run it in a terminal\n"


async def test_the_url_may_end_with_v1(serve: Serve, tmp_path: Path) -> None:
    live = await serve()
    assert (await pipe(tmp_path, "Hi", live.url + "/v1/"))[:2] == (0, "Hello world\n")


async def test_a_wrong_model_is_one_line(serve: Serve, tmp_path: Path) -> None:
    live = await serve()
    status, out, err = await pipe(tmp_path, "Hi", live.url, "--model", "other")
    assert (status, out, err.count("\n")) == (1, "", 1)
    assert err.startswith("outpace chat: the server answers 404: ")
    assert "other" in err


async def test_nobody_there_is_one_line(tmp_path: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
    status, _, err = await pipe(tmp_path, "Hi", f"127.0.0.1:{port}")
    assert status == 1
    assert err == (
        f"outpace chat: no server at http://127.0.0.1:{port}: Connection refused; `outpace serve` starts one\n"
    )


async def test_an_error_within_the_stream_comes_after_the_text(serve: Serve, tmp_path: Path) -> None:
    live = await serve(FakeEngine(failing("out of luck", "Hel", "lo")))
    status, out, err = await pipe(tmp_path, "Hi", live.url)
    assert (status, out, err) == (1, "Hello\n", "outpace chat: out of luck\n")


async def test_a_stream_that_breaks_off_is_an_error(tmp_path: Path) -> None:
    begun = HEADERS + b'data: {"choices": [{"index": 0, "delta": {"content": "Hel"}}]}\n\n'
    async with answering(MODELS, begun) as (url, _):
        status, out, err = await pipe(tmp_path, "Hi", url)
    assert (status, out) == (1, "Hel\n")
    assert err == "outpace chat: the server closed the connection before the answer was complete\n"


async def test_ctrl_c_in_a_pipe_cancels_and_leaves(serve: Serve, tmp_path: Path) -> None:
    live = await serve(FakeEngine(endless, step_s=0.02))
    async with running(tmp_path, live.url) as process, asyncio.timeout(PATIENCE_S):
        assert process.stdin is not None and process.stdout is not None
        process.stdin.write(b"Hi")
        process.stdin.close()
        await process.stdout.readexactly(4)
        process.send_signal(signal.SIGINT)
        assert await process.wait() == 130
        assert process.stderr is not None
        assert await process.stderr.read() == b""
    await live.engine.until(lambda: not live.engine.active)


REFUSED = (
    b"HTTP/1.1 401 Unauthorized\r\nConnection: close\r\n\r\n"
    b'{"error": {"message": "Incorrect\\nkey.", "type": "invalid_request_error", "param": null, "code": null}}'
)


async def test_a_refused_key_is_one_line_that_says_how_to_give_one(tmp_path: Path) -> None:
    async with answering(REFUSED) as (url, _):
        status, _, err = await pipe(tmp_path, "Hi", url)
    assert status == 1
    assert err == ("outpace chat: the server answers 401: Incorrect key. (--api-key or OUTPACE_API_KEY sets the key)\n")


@pytest.mark.parametrize(
    ("arguments", "variables", "key"),
    [
        ((), {}, None),
        ((), {"OPENAI_API_KEY": "theirs"}, "theirs"),
        ((), {"OPENAI_API_KEY": "theirs", "OUTPACE_API_KEY": "ours"}, "ours"),
        (("--api-key", "given"), {"OUTPACE_API_KEY": "ours"}, "given"),
    ],
)
async def test_the_key_comes_from_the_option_or_the_environment(
    arguments: tuple[str, ...], variables: dict[str, str], key: str | None, tmp_path: Path
) -> None:
    async with answering(REFUSED) as (url, heads):
        await pipe(tmp_path, "Hi", url, *arguments, **variables)
    found = [line for line in heads[0].decode().split("\r\n") if line.startswith("Authorization: ")]
    assert found == ([] if key is None else [f"Authorization: Bearer {key}"])


@pytest.mark.parametrize(
    ("answer", "complaint"),
    [
        (HEADERS + b"<html>", "answers, but does not speak OpenAI's API; is the URL right?"),
        (HEADERS + b"[1]", "answers, but does not speak OpenAI's API; is the URL right?"),
        (HEADERS + b'{"data": []}', "serves no model yet; try again in a moment"),
        (b"HTTP/1.1 502 Bad Gateway\r\nConnection: close\r\n\r\n<html>", "the server answers 502: Bad Gateway"),
        (b"SSH-2.0-x\r\n", "broke: SSH-2.0-x"),
    ],
)
async def test_something_else_at_the_url_is_one_line(answer: bytes, complaint: str, tmp_path: Path) -> None:
    async with answering(answer) as (url, _):
        status, _, err = await pipe(tmp_path, "Hi", url)
    assert (status, err.count("\n")) == (1, 1)
    assert complaint in err
