"""Connections that never become a proper request: too slow, too large or no HTTP at all.

aiohttp has no time limit for a request's head, and answers what it cannot parse itself, outside every middleware. Its
connection handler is therefore replaced by one that does both in OpenAI's shape:

    connected ──► head awaited ──► request served ──► idle ──first byte──► head awaited …
                      │ header_timeout_s                │ keepalive_timeout (aiohttp's own)
                      ▼                                 ▼
                 408 and closed                       closed
"""

from __future__ import annotations

import asyncio
import socket
import ssl
from collections.abc import Callable
from typing import Any

from aiohttp import HttpVersion10, web
from aiohttp.abc import AbstractStreamWriter
from aiohttp.http_parser import RawRequestMessage
from aiohttp.streams import StreamReader
from yarl import URL

from server.api.access.bad_http import explain, fault_of, raw_timeout, unusable_head
from server.api.access.request_id import HEADER as REQUEST_ID_HEADER
from server.api.access.request_id import REQUEST_ID, new_request_id
from server.api.errors import ERROR_CODE, ApiError

_KEEPALIVE_S = 75.0
"""Longer than the 60 s after which common load balancers drop an idle connection: they must be the first to close."""
_LINGER_S = 2.0
"""How long the rest of a body that nobody wants is taken in, so that the client can read why."""

Refused = Callable[[str | None, int, str, str], None]
"""Told of every refusal: remote address, status, request id, error code."""


class GuardedServer(web.Server):
    """Makes a guarded handler for each connection, and counts what they refuse."""

    def __init__(self, inner: web.Server, *, header_timeout_s: float, refused: Refused, **options: Any) -> None:
        super().__init__(
            self._serve,
            request_factory=self._begin,
            handler_cancellation=inner.handler_cancellation,
            **options,
        )
        self._inner = inner
        self._options = options
        self.header_timeout_s = header_timeout_s
        self.refused = refused
        self.num_head_timeouts = 0
        self.num_bad_requests = 0

    def __call__(self) -> GuardedHandler:
        return GuardedHandler(self, loop=asyncio.get_running_loop(), **self._options)

    def _begin(
        self,
        message: RawRequestMessage,
        payload: StreamReader,
        protocol: web.RequestHandler,
        writer: AbstractStreamWriter,
        task: asyncio.Task[None],
    ) -> web.BaseRequest:
        assert isinstance(protocol, GuardedHandler)
        fault = fault_of(message)
        if fault is None:
            protocol.begin(payload, None)
            try:
                return self._inner.request_factory(message, payload, protocol, writer, task)
            except Exception:  # noqa: BLE001 - it would end aiohttp's task and leave the connection open for ever
                fault = unusable_head()
        protocol.begin(payload, fault)
        sound = message._replace(path="/", url=URL("/"), version=HttpVersion10, should_close=True)
        return self._inner.request_factory(sound, payload, protocol, writer, task)

    async def _serve(self, request: web.BaseRequest) -> web.StreamResponse:
        protocol = request.protocol
        assert isinstance(protocol, GuardedHandler)
        if protocol.fault is not None:
            return protocol.refuse(request, protocol.fault)
        return await self._inner.request_handler(request)


class GuardedHandler(web.RequestHandler):
    """One connection. Bytes only ever start the clock, so a client that drips them gains no time."""

    __slots__ = ("_behind", "_guard", "_payload", "_serving", "_timer", "fault")

    def __init__(self, server: GuardedServer, **options: Any) -> None:
        super().__init__(server, **options)
        self._guard = server
        self._timer: asyncio.TimerHandle | None = None
        self._payload: StreamReader | None = None
        self._serving = False
        self._behind = False
        self.fault: ApiError | None = None

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        super().connection_made(transport)
        self._start_clock()

    def connection_lost(self, exc: BaseException | None) -> None:
        self._stop_clock()
        super().connection_lost(exc)

    def data_received(self, data: bytes) -> None:
        body = self._payload
        in_body = body is not None and not body.is_eof()
        if data and not in_body:
            if self._serving:
                self._behind = True
            else:
                self._start_clock()
        num_requests = self._request_count
        super().data_received(data)
        if in_body and body is not None and not body.is_eof() and self._request_count > num_requests:
            # No request can begin within a body, so this is a body that cannot be parsed. aiohttp queues its complaint
            # behind the request and leaves whoever reads the body waiting for ever.
            body.set_exception(web.RequestPayloadError("it is not properly chunked"))

    def begin(self, payload: StreamReader, fault: ApiError | None) -> None:
        """A request's head is complete: from here its handler keeps the time, unless there is a fault to tell."""
        self._stop_clock()
        self.fault = fault
        self._serving, self._behind, self._payload = True, False, payload

    def log_access(self, request: web.BaseRequest, response: web.StreamResponse, time: float | None) -> None:
        """Called by aiohttp when an answer is complete. What came meanwhile is the beginning of the next request."""
        self._serving = False
        if self._behind:
            self._behind = False
            self._start_clock()

    def handle_error(
        self,
        request: web.BaseRequest,
        status: int = 500,
        exc: BaseException | None = None,
        message: str | None = None,
    ) -> web.StreamResponse:
        """Answers what never reached the middlewares, and what failed outside them."""
        if isinstance(exc, ConnectionError):  # the client is gone: aiohttp ends the connection without a word
            raise exc
        if request.writer.output_size > 0:
            raise ConnectionError("the answer has begun already")
        error = explain(status, exc, message)
        if error.status >= 500:
            self.log_exception("error outside the middlewares", exc_info=exc)
        return self.refuse(request, error)

    def refuse(self, request: web.BaseRequest, error: ApiError) -> web.Response:
        """The answer, counted and logged, to a request that no middleware sees."""
        response = error.response()
        response.headers[REQUEST_ID_HEADER] = request_id = request.get(REQUEST_ID) or new_request_id()
        if error.status < 500:
            self._guard.num_bad_requests += 1
            self._guard.refused(request.remote, error.status, request_id, response[ERROR_CODE])
        return response

    def log_exception(self, *arguments: Any, **options: Any) -> None:
        """A client's broken body is its own affair, answered already, and no line in the server's log."""
        if not isinstance(options.get("exc_info"), (web.RequestPayloadError, web.PayloadAccessError)):
            super().log_exception(*arguments, **options)

    def _start_clock(self) -> None:
        if self._timer is None:
            loop = asyncio.get_running_loop()
            self._timer = loop.call_later(self._guard.header_timeout_s, self._too_slow)

    def _stop_clock(self) -> None:
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None

    def _too_slow(self) -> None:
        """Only ever between two answers, so that nothing is written into one."""
        self._timer = None
        if self.transport is None or self._serving:
            return
        guard, request_id = self._guard, new_request_id()
        guard.num_head_timeouts += 1
        remote = self.peername[0] if isinstance(self.peername, tuple) else None
        guard.refused(remote, 408, request_id, "request_timeout")
        self.transport.write(raw_timeout(guard.header_timeout_s, request_id))
        self.force_close()


class GuardedRunner(web.AppRunner):
    """An AppRunner whose connections are guarded. `guarded` has the counts, once it is set up."""

    def __init__(
        self,
        app: web.Application,
        *,
        header_timeout_s: float,
        max_header_bytes: int,
        refused: Refused = lambda remote, status, request_id, code: None,
        shutdown_timeout_s: float = 1.0,
    ) -> None:
        # A vanished client cancels its handler at once, and with it its requests in the engine.
        super().__init__(app, handler_cancellation=True, access_log=None, shutdown_timeout=shutdown_timeout_s)
        self._header_timeout_s = header_timeout_s
        self._max_header_bytes = max_header_bytes
        self._refused = refused
        self.guarded: GuardedServer | None = None

    async def _make_server(self) -> web.Server:
        self.guarded = GuardedServer(
            await super()._make_server(),
            header_timeout_s=self._header_timeout_s,
            refused=self._refused,
            access_log=None,
            keepalive_timeout=_KEEPALIVE_S,
            lingering_time=_LINGER_S,
            max_line_size=self._max_header_bytes,
            max_field_size=self._max_header_bytes,
        )
        return self.guarded


class GuardedSite(web.SockSite):
    """Serves a bound socket. A TLS handshake has the same time as a request's head."""

    def __init__(
        self,
        runner: GuardedRunner,
        sock: socket.socket,
        *,
        handshake_timeout_s: float,
        ssl_context: ssl.SSLContext | None = None,
        backlog: int = 1024,
    ) -> None:
        super().__init__(runner, sock, ssl_context=ssl_context, backlog=backlog)
        self._handshake_timeout_s = handshake_timeout_s

    async def start(self) -> None:
        await web.BaseSite.start(self)
        assert self._runner.server is not None
        self._server = await asyncio.get_running_loop().create_server(
            self._runner.server,
            sock=self._sock,
            ssl=self._ssl_context,
            backlog=self._backlog,
            ssl_handshake_timeout=None if self._ssl_context is None else self._handshake_timeout_s,
        )
