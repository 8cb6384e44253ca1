"""The access log: one line of JSON a request. Never prompts, texts, keys or query strings; JSON keeps lines whole."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from datetime import UTC, datetime

import orjson
from aiohttp import web
from aiohttp.typedefs import Middleware

from server.api.access.log_writer import LogWriter
from server.api.access.request_id import REQUEST_ID
from server.api.access.route import UNKNOWN, route_of
from server.api.errors import ERROR_CODE, Handler
from server.api.sse import HIGH_WATER_BYTES, while_taken

CLIENT_CLOSED_REQUEST = 499
"""nginx's status of a request whose client went away before its answer was complete. Nobody is sent it."""

_PROBES = frozenset({"/health", "/ready", "/metrics"})
_MAX_TEXT = 256


@dataclass(slots=True)
class Record:
    """What handlers know of a request, filled in as they learn it: `request[RECORD].model = …`.

    `ttft_ms` is from the request's arrival to its first token. `error_code` is set for errors that are told inside a
    stream; an error answer's own code needs no help. `key` is the key's name.
    """

    key: str | None = None
    model: str | None = None
    arm: str | None = None
    stream: bool | None = None
    prompt_tokens: int | None = None
    completion_tokens: int | None = None
    finish_reasons: list[str] = field(default_factory=list)
    ttft_ms: float | None = None
    error_code: str | None = None


RECORD: web.RequestKey[Record] = web.RequestKey("record", Record)


def record_of(request: web.Request) -> Record:
    """The request's record, also where no access log asked for one."""
    record = request.get(RECORD)
    if record is None:
        record = request[RECORD] = Record()
    return record


class AccessLog:
    """Formats lines and hands them to the writer. A writer of None: off.

    `stopping` says that the server ends what is left: it is then no client's doing that an answer stays incomplete.
    """

    def __init__(
        self,
        writer: LogWriter | None,
        clock: Callable[[], float] = time.perf_counter,
        *,
        stall_timeout_s: float = 120.0,
        dropped: Callable[[], None] = lambda: None,
    ) -> None:
        self._writer = writer
        self._clock = clock
        self._stall_timeout_s = stall_timeout_s
        self._dropped = dropped
        self.stopping = False

    @property
    def middleware(self) -> Middleware:
        """The outermost middleware but the request id's: it sees the answer that leaves."""

        @web.middleware
        async def access_log_middleware(request: web.Request, handler: Handler) -> web.StreamResponse:
            record, start, status = record_of(request), self._clock(), 500
            try:
                response = await handler(request)
                # Written here, not after the middlewares as usual: only so is it known whether it arrived.
                await response.prepare(request)
                await self._send(request, response)
                status = response.status
                record.error_code = response.get(ERROR_CODE, record.error_code)
                return response
            except (asyncio.CancelledError, ConnectionError):
                status = 503 if self.stopping else CLIENT_CLOSED_REQUEST
                raise
            finally:
                self._log(request, record, status, (self._clock() - start) * 1e3)

        return access_log_middleware

    async def _send(self, request: web.Request, response: web.StreamResponse) -> None:
        """The whole answer; a client that takes nothing of it for too long is dropped, like one of a stream."""
        body = response.body if isinstance(response, web.Response) else None
        is_small = not isinstance(body, bytes) or len(body) < HIGH_WATER_BYTES
        transport = request.transport
        if transport is None or (is_small and not request.protocol.writing_paused):
            await response.write_eof()
        else:
            await while_taken(transport, response.write_eof, self._stall_timeout_s, self._dropped)

    def refused(self, remote: str | None, status: int, request_id: str, error_code: str) -> None:
        """A request that was never one: malformed, too large or too slow a head."""
        if self._writer is not None:
            self._write(_line(request_id, remote, None, UNKNOWN, status, None, Record(error_code=error_code)))

    def _log(self, request: web.Request, record: Record, status: int, duration_ms: float) -> None:
        if self._writer is None:
            return
        route = route_of(request)
        if route in _PROBES:
            return
        request_id = request.get(REQUEST_ID)
        self._write(_line(request_id, request.remote, request.method, route, status, duration_ms, record))

    def _write(self, line: dict[str, object]) -> None:
        assert self._writer is not None
        self._writer.write(orjson.dumps(line, option=orjson.OPT_APPEND_NEWLINE))


def _line(
    request_id: str | None,
    remote: str | None,
    method: str | None,
    route: str,
    status: int,
    duration_ms: float | None,
    record: Record,
) -> dict[str, object]:
    return {
        "time": datetime.now(UTC).isoformat(timespec="milliseconds"),
        "request_id": request_id,
        "remote": remote,
        "method": method,
        "route": route,
        "status": status,
        "duration_ms": None if duration_ms is None else round(duration_ms, 3),
        "key": record.key,
        "model": None if record.model is None else _clean(record.model),
        "arm": record.arm,
        "stream": record.stream,
        "prompt_tokens": record.prompt_tokens,
        "completion_tokens": record.completion_tokens,
        "finish_reasons": [_clean(reason) for reason in record.finish_reasons],
        "ttft_ms": None if record.ttft_ms is None else round(record.ttft_ms, 3),
        "error_code": record.error_code,
    }


def _clean(text: str) -> str:
    """Bounded, and without the surrogates that JSON in UTF-8 cannot have."""
    return text[:_MAX_TEXT].encode("utf-8", "replace").decode()
