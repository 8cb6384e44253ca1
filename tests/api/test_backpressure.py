"""Clients that read slowly, or not at all: their tokens are bounded, their generation waits, and nobody else does."""

from __future__ import annotations

import asyncio
import json
import socket
from collections.abc import Sequence
from contextlib import closing
from dataclasses import replace

from server.core import FinishReason, Request, StepOutput
from tests.api.conftest import Live, Serve
from tests.api.fakes import INFO, FakeEngine

NUM_BYTES = 60_000
STEP = 50


def long(request: Request) -> Sequence[StepOutput]:
    """Steps of 50 tokens, each token a byte of its own: `NUM_BYTES` bytes of text."""
    text = b"".join(b"%07d " % number for number in range(NUM_BYTES // 8))
    outputs = [StepOutput(request.request_id, list(text[i : i + STEP])) for i in range(0, len(text), STEP)]
    outputs[-1] = StepOutput(request.request_id, outputs[-1].token_ids, finish_reason=FinishReason.LENGTH)
    return outputs


def connect(live: Live, version: str = "1.1", connection: str = "close", **fields: object) -> socket.socket:
    """A client that has asked for a stream and takes only what fits a small buffer."""
    data = json.dumps({"prompt": "a", "max_tokens": 100, "stream": True, **fields}).encode()
    head = f"POST /v1/completions HTTP/{version}\r\nHost: x\r\nConnection: {connection}\r\n"
    head += "Content-Type: application/json\r\n"
    client = socket.socket()
    client.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 2048)
    client.connect(("127.0.0.1", int(live.url.rsplit(":", 1)[1])))
    client.sendall(f"{head}Content-Length: {len(data)}\r\n\r\n".encode() + data)
    client.setblocking(False)
    return client


def text_of(raw: bytes) -> str:
    """The text of a chunked stream's events."""
    events = [line for line in raw.decode().splitlines() if line.startswith("data: {")]
    return "".join(json.loads(event[6:])["choices"][0]["text"] for event in events)


async def read_all(client: socket.socket) -> bytes:
    loop = asyncio.get_running_loop()
    parts = []
    while part := await loop.sock_recv(client, 65536):
        parts.append(part)
    return b"".join(parts)


async def test_a_stalled_reader_holds_its_request_and_gets_everything_in_the_end(serve: Serve) -> None:
    live = await serve(FakeEngine(long), server={"stream_buffer_tokens": 500})
    with closing(connect(live)) as client:
        await live.engine.until(lambda: bool(live.engine.held))
        await asyncio.sleep(0.1)
        assert live.engine.active, "it is not all generated"
        # What is kept here, what the connection and the kernel's two buffers hold: far from all of it.
        assert live.engine.num_emitted_tokens < NUM_BYTES / 2
        raw = await asyncio.wait_for(read_all(client), 20)
    assert text_of(raw) == "".join(f"{number:07d} " for number in range(NUM_BYTES // 8))
    assert b"data: [DONE]" in raw
    assert not live.engine.held
    assert not live.engine.aborted


async def test_a_reader_that_takes_nothing_is_dropped(serve: Serve) -> None:
    live = await serve(FakeEngine(long), server={"stream_buffer_tokens": 500, "stall_timeout_s": 0.2})
    with closing(connect(live)):
        await live.engine.until(lambda: live.state.num_in_flight == 1)
        await live.engine.until(lambda: live.state.num_in_flight == 0)
    assert len(live.engine.aborted) == 1
    assert "outpace_slow_clients_dropped_total 1.0" in (await live.get("/metrics"))[1]


async def test_a_stalled_reader_that_leaves_takes_its_request_with_it(serve: Serve) -> None:
    live = await serve(FakeEngine(long), server={"stream_buffer_tokens": 500})
    with closing(connect(live)):
        await live.engine.until(lambda: bool(live.engine.held))
    await live.engine.until(lambda: live.state.num_in_flight == 0)
    assert len(live.engine.aborted) == 1


async def test_others_do_not_wait_for_a_stalled_reader(serve: Serve) -> None:
    live = await serve(FakeEngine(long), server={"stream_buffer_tokens": 500})
    with closing(connect(live)):
        await live.engine.until(lambda: bool(live.engine.held))
        status, answer = await live.complete(max_tokens=100)
        assert status == 200
        assert len(answer["choices"][0]["text"]) == NUM_BYTES


async def test_a_first_event_of_any_size_does_not_wait_for_ever(serve: Serve) -> None:
    """Larger than what aiohttp takes without waiting: an echo of a long prompt."""
    info = replace(INFO, max_model_len=400_000, kv_cache_tokens=400_000)
    live = await serve(FakeEngine(info=info), server={"stall_timeout_s": 0.2})
    with closing(connect(live, prompt="x" * 300_000, echo=True)):
        await live.engine.until(lambda: live.state.num_in_flight == 1)
        await live.engine.until(lambda: live.state.num_in_flight == 0)
    assert "outpace_slow_clients_dropped_total 1.0" in (await live.get("/metrics"))[1]


async def test_a_whole_answer_that_nobody_reads_is_dropped_and_holds_no_place_meanwhile(serve: Serve) -> None:
    info = replace(INFO, max_model_len=400_000, kv_cache_tokens=400_000)
    live = await serve(FakeEngine(info=info), server={"stall_timeout_s": 0.3})
    with closing(connect(live, prompt="x" * 300_000, echo=True, stream=False)):
        counts = live.state.control.counts
        await live.engine.until(lambda: live.state.num_in_flight == 1 and counts.total() == (1, 300_000))
        await live.engine.until(lambda: counts.total() == (0, 0))
        assert live.state.num_in_flight == 1
        await live.engine.until(lambda: live.state.num_in_flight == 0)
    assert "outpace_slow_clients_dropped_total 1.0" in (await live.get("/metrics"))[1]


async def test_a_reader_that_is_slow_but_moves_is_not_dropped(serve: Serve) -> None:
    live = await serve(FakeEngine(long), server={"stream_buffer_tokens": 500, "stall_timeout_s": 0.5})
    loop = asyncio.get_running_loop()
    with closing(connect(live)) as client:
        taken = 0
        until = loop.time() + 2.5
        while loop.time() < until:
            taken += len(await asyncio.wait_for(loop.sock_recv(client, 4096), 5))
            await asyncio.sleep(0.02)
        assert live.state.num_in_flight == 1, "it is still served after five times the stall timeout"
        assert taken > 0
    await live.engine.until(lambda: live.state.num_in_flight == 0)


async def test_an_http_1_0_stream_ends_with_its_connection(serve: Serve) -> None:
    """There are no chunks to tell the end, whatever the client says of keeping the connection."""
    live = await serve(FakeEngine())
    with closing(connect(live, version="1.0", connection="keep-alive")) as client:
        raw = await asyncio.wait_for(read_all(client), 10)
    assert raw.endswith(b"data: [DONE]\n\n")
    assert b"Transfer-Encoding" not in raw
