"""One client's line to the engine process: requests out, outputs to whoever asked, on the event loop. No torch.

Outputs are handed to a request's sink by a plain call, as they are read: a streamed token costs no task switch.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, Callable
from dataclasses import dataclass
from typing import Protocol

import msgspec

from server.core import Request, StepOutput
from server.engine.errors import EngineUnavailable
from server.engine.kinds import ABORT, FRAME, HELLO, HOLD, INFO, PONG, RESUME, SUBMIT
from server.engine.messages import EngineFrame, EngineInfo, EngineStats
from server.engine.wire import Line

MAX_TRIES = 3
"""Engines a request that has not started may be sent to: one that kills every engine must not go on for ever."""


class Sink(Protocol):
    """Takes one request's outputs. Called on the event loop; must neither block nor raise."""

    def started(self) -> None:
        """The request holds a slot: its first step is about to begin. Not every engine says it."""

    def put(self, output: StepOutput) -> None:
        """One step's output; the last one has a finish reason."""

    def fail(self, error: EngineUnavailable) -> None:
        """There will be no more outputs: the engine is gone."""


@dataclass(slots=True)
class _InFlight:
    request: Request
    sink: Sink
    started: bool = False
    tries: int = 0


class EngineConnection:
    """A line to one engine process after another. `identity` is unique among the engine's clients.

    `disconnect` fails the requests that hold a slot and keeps those that still wait; `connect` sends them again, since
    nothing of them has reached anybody. `on_frame`, `on_info` and `on_pong` see what arrives; an exception in handling
    a message goes to `on_error`, once, and no further message is read: what could not be handled would leave requests
    hanging.
    """

    def __init__(self, identity: bytes) -> None:
        self.identity = identity
        self.stats = EngineStats()
        self.on_frame: Callable[[EngineFrame], None] | None = None
        self.on_info: Callable[[EngineInfo], None] | None = None
        self.on_pong: Callable[[EngineStats], None] | None = None
        self.on_error: Callable[[Exception], None] | None = None
        self._in_flight: dict[str, _InFlight] = {}
        self._line: Line | None = None
        self._idle = asyncio.Event()
        self._idle.set()
        self._encode = msgspec.msgpack.Encoder().encode
        self._decode_frame = msgspec.msgpack.Decoder(EngineFrame).decode

    @property
    def connected(self) -> bool:
        return self._line is not None

    @property
    def num_in_flight(self) -> int:
        return len(self._in_flight)

    # -- the line --------------------------------------------------------------------------------------------

    def connect(self, endpoint: str) -> None:
        """Greets the engine at `endpoint` and sends it every request that was kept. Raises OSError if there is none."""
        self._line = Line(endpoint, self.identity, self._receive)
        self.send(HELLO)
        for entry in list(self._in_flight.values()):
            self._send_request(entry)

    def disconnect(self, reason: str, *, keep_waiting: bool = True) -> None:
        """The engine is gone. Requests that wait are kept for the next one unless `keep_waiting` is False."""
        if self._line is not None:
            self._line.close()
            self._line = None
        self.stats = EngineStats()  # what waited and ran there is gone
        for request_id, entry in list(self._in_flight.items()):
            if entry.started or not keep_waiting or entry.tries >= MAX_TRIES:
                self._forget(request_id)
                entry.sink.fail(EngineUnavailable(reason))

    def close(self) -> None:
        """Fails what is left."""
        self.disconnect("the server is shutting down", keep_waiting=False)

    def send(self, kind: bytes, payload: bytes = b"") -> None:
        """Sends a message. RuntimeError if there is no engine to send it to."""
        if self._line is None:
            raise RuntimeError("not connected to an engine")
        self._line.send(kind, payload)

    # -- requests --------------------------------------------------------------------------------------------

    def submit(self, request: Request, sink: Sink) -> None:
        """Sends a request; its outputs go to `sink`.

        Raises EngineUnavailable if there is no engine, ValueError if the request's id is in flight.
        """
        if request.request_id in self._in_flight:
            raise ValueError(f"request id {request.request_id!r} is in flight")
        if self._line is None:
            raise EngineUnavailable("the engine is not ready")
        entry = self._in_flight[request.request_id] = _InFlight(request, sink)
        self._idle.clear()
        self._send_request(entry)

    def abort(self, request_id: str) -> None:
        """Ends a request; its sink hears no more. One that is not in flight is ignored: it may just have ended."""
        if self._forget(request_id) and self._line is not None:
            self.send(ABORT, request_id.encode())

    def hold(self, request_id: str) -> None:
        """Suspends a request whose reader is slow, until `resume`."""
        if request_id in self._in_flight and self._line is not None:
            self.send(HOLD, request_id.encode())

    def resume(self, request_id: str) -> None:
        if request_id in self._in_flight and self._line is not None:
            self.send(RESUME, request_id.encode())

    async def stream(self, request: Request) -> AsyncGenerator[StepOutput, None]:
        """`submit` as a generator; closing it aborts the request. Raises what `submit` raises and EngineUnavailable."""
        queue = _QueueSink()
        self.submit(request, queue)
        try:
            while True:
                item = await queue.items.get()
                if isinstance(item, EngineUnavailable):
                    raise item
                yield item
                if item.finish_reason is not None:
                    return
        finally:
            self.abort(request.request_id)

    async def wait_idle(self) -> None:
        """Returns once no request is in flight."""
        await self._idle.wait()

    def _send_request(self, entry: _InFlight) -> None:
        entry.tries += 1
        self.send(SUBMIT, self._encode(entry.request))

    def _forget(self, request_id: str) -> bool:
        if self._in_flight.pop(request_id, None) is None:
            return False
        if not self._in_flight:
            self._idle.set()
        return True

    # -- what arrives ----------------------------------------------------------------------------------------

    def _receive(self, kind: bytes, payload: bytes) -> None:
        try:
            self._handle(kind, payload)
        except Exception as error:
            if self._line is not None:
                self._line.stop_reading()
            if self.on_error is None:
                raise
            self.on_error(error)

    def _handle(self, kind: bytes, payload: bytes) -> None:
        if kind == FRAME:
            self._deliver(self._decode_frame(payload))
        elif kind == PONG:
            if self.on_pong is not None:
                self.on_pong(msgspec.msgpack.decode(payload, type=EngineStats))
        elif kind == INFO and self.on_info is not None:
            self.on_info(msgspec.msgpack.decode(payload, type=EngineInfo))

    def _deliver(self, frame: EngineFrame) -> None:
        self.stats = frame.stats
        if self.on_frame is not None:
            self.on_frame(frame)
        in_flight = self._in_flight
        for request_id in frame.started:
            entry = in_flight.get(request_id)
            if entry is not None:
                entry.started = True
                entry.sink.started()
        for output in frame.outputs:
            entry = in_flight.get(output.request_id)
            if entry is None:  # aborted a moment ago
                continue
            entry.started = True
            if output.finish_reason is not None:
                self._forget(output.request_id)
            entry.sink.put(output)


class _QueueSink:
    def __init__(self) -> None:
        self.items: asyncio.Queue[StepOutput | EngineUnavailable] = asyncio.Queue()

    def started(self) -> None:
        """Nobody asks."""

    def put(self, output: StepOutput) -> None:
        self.items.put_nowait(output)

    def fail(self, error: EngineUnavailable) -> None:
        self.items.put_nowait(error)
