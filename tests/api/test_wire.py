"""The bytes on the socket, compared with golden files: what a client's parser sees of every kind of answer.

`make goldens` (OUTPACE_UPDATE_GOLDEN=1) writes the files anew; their diff is what changes for clients. Only ids, dates,
times and versions are replaced before comparing. The files show every line end: `\\r\\n` or `\\n`, then a line break.
"""

from __future__ import annotations

import asyncio
import hashlib
import os
import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import orjson
import pytest

from server.api.params import Limits
from server.core import FinishReason, Request, StepOutput
from server.engine.connection import Sink
from tests.api.conftest import Serve
from tests.api.fakes import FakeEngine, Script, endless, failing, steps

GOLDEN = Path(__file__).parent / "golden"
UPDATE = os.environ.get("OUTPACE_UPDATE_GOLDEN") == "1"
CHAT, COMPLETIONS = "/v1/chat/completions", "/v1/completions"
KEY = "sk-outpace-for-tests"
CHANGING = [
    (rb'"id":"(chatcmpl|cmpl)-[0-9a-zA-Z]+"', rb'"id":"\1-ID"'),
    (rb'"created":\d+', rb'"created":TIME'),
    (rb"(?mi)^(x-request-id): [^\r]+", rb"\1: ID"),
    (rb"(?m)^Date: [^\r]+", rb"Date: DATE"),
    (rb"(?m)^Server: Python/[0-9.]+ aiohttp/[0-9.]+", rb"Server: VERSIONS"),
]


class OrderlyEngine(FakeEngine):
    """One step at a time, requests in turn: every step is a write of its own, whatever else the machine does."""

    def __init__(self, script: Script) -> None:
        super().__init__(script)
        self._turn = asyncio.Lock()

    async def _run(self, request: Request, outputs: Sequence[StepOutput], sink: Sink) -> None:
        try:
            for output in outputs:
                async with self._turn:
                    await asyncio.sleep(0.01)
                    sink.put(output)
        finally:
            self._tasks.pop(request.request_id, None)


@dataclass(frozen=True, slots=True)
class Exchange:
    """What is sent and how the server stands. `full`: its queue is; `dead`: its engine is."""

    sent: bytes
    script: Script = field(default_factory=lambda: steps("Hello", " wörld"))
    server: dict[str, Any] = field(default_factory=dict)
    limits: Limits = field(default_factory=Limits)
    full: bool = False
    dead: bool = False


def post(path: str, *, close: bool = True, version: str = "1.1", **fields: Any) -> bytes:
    """The request as a client would write it."""
    subject = {"messages": [{"role": "user", "content": "Hi"}]} if path == CHAT else {"prompt": "Hi", "max_tokens": 40}
    return raw_post(path, orjson.dumps({"model": "fake", **subject, **fields}), close=close, version=version)


def raw_post(
    path: str, body: bytes, *, close: bool = True, version: str = "1.1", kind: str = "application/json", key: str = KEY
) -> bytes:
    lines = [f"POST {path} HTTP/{version}", "Host: outpace", f"Content-Type: {kind}", f"Content-Length: {len(body)}"]
    lines += [f"Authorization: Bearer {key}", *(["Connection: close"] if close else []), "", ""]
    return "\r\n".join(lines).encode() + body


def get(path: str, method: str = "GET", *, close: bool = True) -> bytes:
    lines = [f"{method} {path} HTTP/1.1", "Host: outpace", f"Authorization: Bearer {KEY}"]
    return "\r\n".join([*lines, *(["Connection: close"] if close else []), "", ""]).encode()


USAGE: Any = {"stream_options": {"include_usage": True}}
EXCHANGES = {
    "chat": Exchange(post(CHAT)),
    "chat_logprobs": Exchange(post(CHAT, logprobs=True, top_logprobs=2), steps("Hé")),
    "chat_stream": Exchange(post(CHAT, stream=True)),
    "chat_stream_usage": Exchange(post(CHAT, stream=True, **USAGE)),
    "chat_stream_n2": Exchange(post(CHAT, stream=True, n=2)),
    "chat_stream_logprobs": Exchange(post(CHAT, stream=True, logprobs=True, top_logprobs=2), steps("H", "é")),
    "chat_stream_stop_across_chunks": Exchange(
        post(CHAT, stream=True, stop=["STOP"], **USAGE), steps("one S", "T", "two ST", "OP three")
    ),
    "chat_stream_length": Exchange(post(CHAT, stream=True, max_tokens=3), steps("Hel", finish=FinishReason.LENGTH)),
    "chat_stream_split_character": Exchange(post(CHAT, stream=True), steps(b"\xf0\x9f", b"\x98\x80!")),
    "completions": Exchange(post(COMPLETIONS)),
    "completions_stream": Exchange(post(COMPLETIONS, stream=True)),
    "completions_stream_usage": Exchange(post(COMPLETIONS, stream=True, **USAGE)),
    "completions_stream_logprobs": Exchange(post(COMPLETIONS, stream=True, logprobs=1), steps("H", "é")),
    "error_before_stream": Exchange(post(CHAT, stream=True), failing("out of luck")),
    "error_in_stream": Exchange(post(CHAT, stream=True), failing("out of luck", "Hel", "lo")),
    "error_400_value": Exchange(post(CHAT, temperature=3)),
    "error_400_unknown_field": Exchange(post(COMPLETIONS, temperatur=1)),
    "error_400_json": Exchange(raw_post(CHAT, b'{"messages": [')),
    "error_400_context_length": Exchange(post(CHAT, max_tokens=5000)),
    "error_400_http": Exchange(b"GET / HTTP/1.1\r\nno colon\r\n\r\n"),
    "error_401_no_key": Exchange(b"GET /v1/models HTTP/1.1\r\nHost: outpace\r\nConnection: close\r\n\r\n"),
    "error_401_wrong_key": Exchange(raw_post(CHAT, b"{}", key="sk-outpace-something-else")),
    "error_403_priority": Exchange(post(CHAT, priority=-1)),
    "error_404_model": Exchange(post(CHAT, model="other")),
    "error_404_url": Exchange(get("/v1/nothing")),
    "error_405": Exchange(get(CHAT)),
    "error_408_deadline": Exchange(post(CHAT, timeout=0.05), endless),
    "error_408_deadline_in_stream": Exchange(post(CHAT, timeout=0.3, stream=True), steps("Hi", finish=None)),
    "error_408_head": Exchange(b"POST /v1/chat/completions HTTP/1.1\r\n", server={"header_timeout_s": 0.1}),
    "error_408_body": Exchange(post(CHAT)[:-5], server={"body_timeout_s": 0.1}),
    "error_413": Exchange(post(COMPLETIONS, user="x" * 2000), limits=Limits(max_body_bytes=1024)),
    "error_415": Exchange(raw_post(CHAT, b"a=b", kind="application/x-www-form-urlencoded")),
    "error_429": Exchange(post(CHAT), endless, full=True),
    "error_431": Exchange(get("/" + "a" * 2000), server={"max_header_bytes": 1024}),
    "error_503": Exchange(post(CHAT), dead=True),
    "error_503_ready": Exchange(get("/ready"), dead=True),
    "head": Exchange(get("/health", "HEAD")),
    "keep_alive": Exchange(get("/health", close=False) + post(CHAT, close=False, stream=True) + get("/health")),
    "http10": Exchange(post(CHAT, version="1.0", close=False)),
    "http10_stream": Exchange(post(CHAT, version="1.0", close=False, stream=True)),
}


@pytest.mark.parametrize("name", EXCHANGES)
async def test_bytes_on_the_wire(name: str, serve: Serve, tmp_path: Path) -> None:
    exchange = EXCHANGES[name]
    keys = tmp_path / "keys.toml"
    keys.write_text(f'[[key]]\nname = "alice"\nsha256 = "{hashlib.sha256(KEY.encode()).hexdigest()}"\n')
    engine = OrderlyEngine(exchange.script)
    settings = {"api_keys": str(keys), **exchange.server}
    live = await serve(engine, limits=exchange.limits, server=settings, max_num_seqs=1, max_waiting=1)
    if exchange.dead:
        engine.die("it crashed")
    filler = None
    if exchange.full:
        filler = await _open(live.url, post(COMPLETIONS, stream=True, n=2))
        await live.engine.until(lambda: len(engine.requests) == 2)
    received = await _exchange(live.url, exchange.sent)
    if filler is not None:
        filler.close()
    _compare(name, received)


def test_there_is_no_golden_file_too_many() -> None:
    assert {path.stem for path in GOLDEN.iterdir()} == set(EXCHANGES)


async def _open(url: str, sent: bytes) -> asyncio.StreamWriter:
    _, writer = await asyncio.open_connection("127.0.0.1", int(url.rsplit(":", 1)[1]))
    writer.write(sent)
    return writer


async def _exchange(url: str, sent: bytes) -> bytes:
    """Everything that comes until the server closes the connection."""
    reader, writer = await asyncio.open_connection("127.0.0.1", int(url.rsplit(":", 1)[1]))
    writer.write(sent)
    try:
        async with asyncio.timeout(20):
            return await reader.read(-1)
    finally:
        writer.close()
        await writer.wait_closed()


def _compare(name: str, received: bytes) -> None:
    for pattern, replacement in CHANGING:
        received = re.sub(pattern, replacement, received)
    shown = re.sub(r"(\r?\n)", lambda m: repr(m[1])[1:-1] + "\n", received.decode())
    path = GOLDEN / f"{name}.txt"
    if UPDATE:
        GOLDEN.mkdir(exist_ok=True)
        path.write_text(shown, encoding="utf-8")
    assert path.read_text(encoding="utf-8") == shown
