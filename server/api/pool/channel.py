"""The owner's and a worker's ends of their line: one msgpack object a message, read without a task."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import Any

import msgspec

from server.api.pool.messages import ToOwner, ToWorker
from server.engine.kinds import GONE
from server.engine.wire import Hub, Line

_encode = msgspec.msgpack.Encoder().encode


class OwnerChannel:
    """Listens at `path`; `handle(identity, message)` is called for every worker's message."""

    def __init__(self, path: str, handle: Callable[[bytes, ToOwner], None]) -> None:
        self._handle = handle
        self._decode: Callable[[bytes], Any] = msgspec.msgpack.Decoder(ToOwner).decode
        self._hub = Hub(path)
        self._loop = asyncio.get_running_loop()
        self._loop.add_reader(self._hub.fileno(), self._receive)

    def send(self, message: ToWorker, identity: bytes) -> None:
        """To the worker with this identity; one that is gone is ignored."""
        self._hub.send(identity, b"", _encode(message))

    def close(self) -> None:
        self._loop.remove_reader(self._hub.fileno())
        self._hub.close()

    def _receive(self) -> None:
        for identity, kind, payload in self._hub.receive():
            if kind != GONE:  # its process has ended as well, and that is what counts
                self._handle(identity, self._decode(payload))


class WorkerChannel:
    """Connects to the owner at `path`; `handle(message)` is called for every message."""

    def __init__(self, path: str, identity: bytes, handle: Callable[[ToWorker], None]) -> None:
        decode: Callable[[bytes], Any] = msgspec.msgpack.Decoder(ToWorker).decode
        self._line = Line(path, identity, lambda _, payload: handle(decode(payload)))

    def send(self, message: ToOwner) -> None:
        self._line.send(b"", _encode(message))

    def close(self) -> None:
        self._line.close()
