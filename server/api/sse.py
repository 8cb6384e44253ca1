"""Server-sent events as OpenAI frames them: `data: {json}`, a blank line, and `data: [DONE]` at the end."""

from __future__ import annotations

from typing import Any

import orjson
from aiohttp import web

DONE = b"data: [DONE]\n\n"
HEADERS = {
    "Content-Type": "text/event-stream; charset=utf-8",
    "Cache-Control": "no-cache",
    # Proxies such as nginx would otherwise collect the stream before passing it on.
    "X-Accel-Buffering": "no",
}


def event(payload: dict[str, Any]) -> bytes:
    """One event; orjson writes no newline that could break the framing."""
    return b"data: " + orjson.dumps(payload) + b"\n\n"


class EventStream:
    """One response body of events. A client that is gone makes `send` raise ConnectionResetError."""

    def __init__(self, request: web.Request, headers: dict[str, str]) -> None:
        self._request = request
        self.response = web.StreamResponse(headers=HEADERS | headers)

    async def open(self) -> None:
        await self.response.prepare(self._request)

    async def send(self, *payloads: dict[str, Any]) -> None:
        await self._write(b"".join(map(event, payloads)))

    async def done(self) -> None:
        await self._write(DONE)
        await self.response.write_eof()

    async def fail(self, error: dict[str, Any]) -> None:
        """An error in a stream that has begun: an event with the error's body, then the end without `[DONE]`."""
        await self._write(event(error))
        await self.response.write_eof()

    async def _write(self, data: bytes) -> None:
        transport = self._request.transport
        if transport is None or transport.is_closing():
            raise ConnectionResetError("the client is gone")
        await self.response.write(data)
