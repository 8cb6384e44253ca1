"""Server-sent events as OpenAI frames them: `data: {json}`, a blank line, and `data: [DONE]` at the end.

Events leave by a plain call, so that a token costs no task switch. What a slow reader does not take is kept, up to a
bound after which the source is told to pause; one that takes nothing for too long is dropped.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections import deque
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from typing import Any

import orjson
from aiohttp import HttpVersion11, web
from aiohttp.abc import AbstractStreamWriter

DONE = b"data: [DONE]\n\n"
HEADERS = {
    "Content-Type": "text/event-stream; charset=utf-8",
    "Cache-Control": "no-cache",
    # Proxies such as nginx would otherwise collect the stream before passing it on.
    "X-Accel-Buffering": "no",
}
HIGH_WATER_BYTES = 32 * 1024
"""What the connection may hold unsent before events are kept here instead."""


def event(payload: dict[str, Any]) -> bytes:
    """One event; orjson writes no newline that could break the framing."""
    return b"data: " + orjson.dumps(payload) + b"\n\n"


@dataclass(frozen=True, slots=True)
class Flow:
    """What happens when the client does not read: `pause` at `max_tokens` kept tokens, `resume` at half of them.

    A client that takes nothing for `stall_timeout_s` seconds is dropped, and `dropped` is called.
    """

    max_tokens: int
    stall_timeout_s: float
    pause: Callable[[], None]
    resume: Callable[[], None]
    dropped: Callable[[], None]


async def while_taken(
    transport: asyncio.Transport, wait: Callable[[], Awaitable[None]], timeout_s: float, dropped: Callable[[], None]
) -> None:
    """Awaits `wait()` for as long as the peer takes something every `timeout_s` seconds.

    Else calls `dropped`, ends the connection and raises ConnectionResetError.
    """
    task = asyncio.ensure_future(wait())
    try:
        while True:
            num_left = transport.get_write_buffer_size()
            done, _ = await asyncio.wait({task}, timeout=timeout_s)
            if done:
                return task.result()
            if transport.get_write_buffer_size() >= num_left:
                dropped()
                transport.abort()
                raise ConnectionResetError("the client does not read")
    finally:
        task.cancel()


class EventStream:
    """One response body of events. A client that is gone makes coroutines raise ConnectionResetError.

    `open` sends the head; from then on `push` sends at once, or keeps what the connection does not take and lets a task
    of its own send it later.
    """

    def __init__(self, request: web.Request, headers: dict[str, str], flow: Flow) -> None:
        self._request = request
        self._flow = flow
        self._writer: AbstractStreamWriter | None = None
        self._transport: asyncio.Transport | None = None
        self._chunked = request.version >= HttpVersion11
        self._kept: deque[tuple[bytes, int]] = deque()
        self._num_kept_tokens = 0
        self._paused = False
        self._pump: asyncio.Task[None] | None = None
        self._head_sent = False
        self.response = web.StreamResponse(headers=HEADERS | headers)
        if self._chunked:
            self.response.enable_chunked_encoding()
        else:
            self.response.force_close()  # nothing else tells an HTTP/1.0 client where the body ends

    @property
    def num_kept_tokens(self) -> int:
        """Tokens that wait for the client."""
        return self._num_kept_tokens

    async def open(self, first: bytes) -> None:
        """Sends the head and the first events; what was pushed before follows."""
        transport = self._open_transport()
        transport.set_write_buffer_limits(high=HIGH_WATER_BYTES)
        self._writer = await self.response.prepare(self._request)
        await self._write(first)
        self._transport = transport
        self._send_kept()

    def push(self, data: bytes, num_tokens: int) -> None:
        """Sends `data`, which carries `num_tokens` tokens, now or as soon as the client takes it."""
        transport = self._transport
        if transport is None or self._kept or self._request.protocol.writing_paused:
            self._keep(data, num_tokens)
        elif not transport.is_closing():  # else: the handler is being cancelled already
            transport.write(self._framed(data))

    async def finish(self, data: bytes) -> None:
        """Sends what is kept, then `data`, and ends the body."""
        while self._pump is not None:
            await asyncio.shield(self._pump)
        await self._taken()
        await self._within(lambda: self.response.write_eof(data))

    def close(self) -> None:
        """Forgets what is kept. To be called however the stream is left."""
        if self._pump is not None:
            self._pump.cancel()
        self._kept.clear()

    def _framed(self, data: bytes) -> bytes:
        """RFC 9112, section 7.1. aiohttp frames in a coroutine of its own, which costs more than the event."""
        return b"%x\r\n%b\r\n" % (len(data), data) if self._chunked else data

    def _keep(self, data: bytes, num_tokens: int) -> None:
        self._kept.append((data, num_tokens))
        self._num_kept_tokens += num_tokens
        if self._num_kept_tokens >= self._flow.max_tokens and not self._paused:
            self._paused = True
            self._flow.pause()
        if self._transport is not None:
            self._send_kept()

    def _send_kept(self) -> None:
        if self._kept and self._pump is None:
            self._pump = asyncio.get_running_loop().create_task(self._drain_kept())

    async def _drain_kept(self) -> None:
        try:
            # A client that is gone: the handler is being cancelled, and closes the stream.
            with contextlib.suppress(ConnectionError):
                while self._kept:
                    await self._send_oldest()
        finally:
            self._pump = None

    async def _send_oldest(self) -> None:
        data, num_tokens = self._kept[0]
        await self._write(data)
        self._kept.popleft()
        self._num_kept_tokens -= num_tokens
        if self._paused and self._num_kept_tokens <= self._flow.max_tokens // 2:
            self._paused = False
            self._flow.resume()

    async def _write(self, data: bytes) -> None:
        """Returns once the connection has room again."""
        assert self._writer is not None
        if not self._head_sent:  # aiohttp's own write, with the head; beyond 64 KiB it would wait by itself, for ever
            self._head_sent = True
            await self._writer.write(data[:HIGH_WATER_BYTES])
            data = data[HIGH_WATER_BYTES:]
        if data:
            self._open_transport().write(self._framed(data))
        await self._taken()

    async def _taken(self) -> None:
        """Returns once the connection has room."""
        if self._request.protocol.writing_paused:
            assert self._writer is not None
            await self._within(self._writer.drain)

    async def _within(self, wait: Callable[[], Awaitable[None]]) -> None:
        """Raises ConnectionResetError where the client takes nothing at all for too long; slowly is fast enough."""
        await while_taken(self._open_transport(), wait, self._flow.stall_timeout_s, self._flow.dropped)

    def _open_transport(self) -> asyncio.Transport:
        transport = self._request.transport
        if transport is None or transport.is_closing():
            raise ConnectionResetError("the client is gone")
        return transport
