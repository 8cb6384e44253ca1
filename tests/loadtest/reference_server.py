"""A server whose every latency is known: it streams by a script, and writes down when it sent what.

    python reference_server.py PORT

`POST /script` sets what is streamed: `{"ttft_s", "gap_s", "tokens"}`, each a number or a list to go through
(request by request for `ttft_s`, chunk by chunk for the others). A `stall` of
`[at_s, length_s]` sends nothing in that time after the first request; what comes after it is late by as much. `GET
/log` gives the times of all chunks of all requests, on the machine's monotonic clock.
"""

from __future__ import annotations

import asyncio
import json
import sys
import time
from typing import Any, cast

import uvloop

HEAD = b"HTTP/1.1 200 OK\r\nContent-Type: text/event-stream\r\nTransfer-Encoding: chunked\r\n\r\n"


class State:
    """What all connections share: the script, the log."""

    def __init__(self) -> None:
        self.script: dict[str, Any] = {}
        self.began: float | None = None
        self.log: list[list[float]] = []


def pick(value: Any, index: int) -> float:
    return float(value[index % len(value)]) if isinstance(value, list) else float(value)


class Connection(asyncio.Protocol):
    """One keep-alive connection; answers one request at a time."""

    def __init__(self, state: State) -> None:
        self.state = state
        self.rest = b""

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self.transport = cast(asyncio.Transport, transport)  # uvloop's is no subclass

    def data_received(self, data: bytes) -> None:
        self.rest += data
        head, end, body = self.rest.partition(b"\r\n\r\n")
        if not end:
            return
        length = next((int(h[15:]) for h in head.lower().split(b"\r\n") if h.startswith(b"content-length:")), 0)
        if len(body) < length:
            return
        self.rest = body[length:]
        path = head.split(b" ", 2)[1]
        if path == b"/v1/models":
            self.answer({"data": [{"id": "reference"}]})
        elif path == b"/log":
            self.answer(self.state.log)
        elif path == b"/script":
            self.state.script = json.loads(body[:length])
            self.state.log, self.state.began = [], None
            self.answer({})
        elif path.startswith(b"/v1/"):
            self.stream(json.loads(body[:length]))
        else:
            self.answer({}, b"404 Not Found")

    def answer(self, content: Any, status: bytes = b"200 OK") -> None:
        data = json.dumps(content).encode()
        self.transport.write(
            b"HTTP/1.1 "
            + status
            + b"\r\nContent-Type: application/json\r\nContent-Length: %d\r\n\r\n" % len(data)
            + data
        )

    def stream(self, body: dict[str, Any]) -> None:
        script = self.state.script
        options = body.get("stream_options") or {}
        if options.get("continuous_usage_stats") and not script.get("continuous", True):
            self.answer({"error": {"message": "continuous_usage_stats is not supported"}}, b"400 Bad Request")
            return
        if script.get("status"):
            self.answer({"error": {"message": "scripted"}}, script["status"].encode())
            return
        now = time.monotonic()
        if self.state.began is None:
            self.state.began = now
        number = len(self.state.log)
        self.sent: list[float] = []
        self.state.log.append(self.sent)
        self.body, self.left, self.chunk, self.made = body, int(body["max_tokens"]), 0, 0
        self.due = now + pick(script.get("ttft_s", 0.01), number)
        self.schedule()

    def schedule(self) -> None:
        stall = self.state.script.get("stall")
        assert self.state.began is not None
        if stall is not None and stall[0] <= self.due - self.state.began < stall[0] + stall[1]:
            self.due = self.state.began + stall[0] + stall[1]
        loop = asyncio.get_running_loop()
        loop.call_later(max(0.0, self.due - time.monotonic()), self.emit)

    def emit(self) -> None:
        if self.transport.is_closing():
            return
        script, first = self.state.script, not self.sent
        count = min(self.left, int(pick(script.get("tokens", 1), self.chunk)))
        self.left -= count
        self.made += count
        self.chunk += 1
        now = time.monotonic()
        last = not self.left
        if not first and "breaks" in script:
            self.break_off(script["breaks"])
            return
        self.sent.append(now)
        self.transport.write((HEAD if first else b"") + self.event(last))
        if last:
            return
        self.due = self.due + pick(script.get("gap_s", 0.01), self.chunk - 1)
        self.schedule()

    def break_off(self, how: str) -> None:
        """Ends a stream in a way that none should: `close`, `drop` the connection, an `error` event, `nonsense`."""
        if how == "drop":
            self.transport.abort()
            return
        said = {
            "close": b"",
            "error": b'data: {"error":{"code":"engine_unavailable"}}\n\n',
            "nonsense": b"data: {\n\n",
        }[how]
        self.transport.write((b"%x\r\n%s\r\n" % (len(said), said) if said else b"") + b"0\r\n\r\n")

    def event(self, last: bool) -> bytes:
        usage = b'{"prompt_tokens":%d,"completion_tokens":%d}' % (self.prompt_tokens(), self.made)
        continuous = (self.body.get("stream_options") or {}).get("continuous_usage_stats")
        part = b'data: {"choices":[{"index":0,"delta":{"content":" word"},"finish_reason":%s}],"usage":%s}\n\n' % (
            b'"length"' if last else b"null",
            usage if continuous else b"null",
        )
        if last:
            part += b'data: {"choices":[],"usage":%s}\n\ndata: [DONE]\n\n' % usage
        return b"%x\r\n%s\r\n" % (len(part), part) + (b"0\r\n\r\n" if last else b"")

    def prompt_tokens(self) -> int:
        words = sum(len(message["content"].split()) for message in self.body.get("messages", ()))
        return words + 8


async def serve(port: int) -> None:
    state = State()
    server = await asyncio.get_running_loop().create_server(lambda: Connection(state), "127.0.0.1", port, backlog=4096)
    print(server.sockets[0].getsockname()[1], flush=True)
    await server.serve_forever()


if __name__ == "__main__":
    uvloop.run(serve(int(sys.argv[1])))
