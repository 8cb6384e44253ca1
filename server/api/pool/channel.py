"""The owner's and a worker's ends of their ZeroMQ IPC line, on the event loop without a task."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import Generic, TypeVar

import msgspec
import zmq

M = TypeVar("M")


class Channel(Generic[M]):
    """Reads messages of one type from a socket and hands them to `handle(sender, message)`, where `sender` is the
    peer's identity on the owner's ROUTER and empty on a worker's DEALER.
    """

    def __init__(self, socket: zmq.Socket[bytes], kind: type[M], handle: Callable[[bytes, M], None]) -> None:
        self._socket = socket
        self._handle = handle
        self._decode = msgspec.msgpack.Decoder(kind).decode
        self._encode = msgspec.msgpack.Encoder().encode
        self._is_router = socket.socket_type == zmq.ROUTER
        self._loop = asyncio.get_running_loop()
        self._fd = int(socket.getsockopt(zmq.FD))
        self._closed = False
        self._loop.add_reader(self._fd, self._receive)
        self._loop.call_soon(self._receive)

    def send(self, message: object, to: bytes = b"") -> None:
        """To the owner, or to the worker with this identity; a worker that is gone is ignored."""
        if self._closed:
            return
        data = self._encode(message)
        self._socket.send_multipart([to, data] if self._is_router else [data], zmq.NOBLOCK)
        self._loop.call_soon(self._receive)  # sending may swallow the edge that says that something can be read

    def close(self) -> None:
        if not self._closed:
            self._closed = True
            self._loop.remove_reader(self._fd)
            self._socket.close(linger=200)

    def _receive(self) -> None:
        while not self._closed:
            try:
                *sender, data = self._socket.recv_multipart(zmq.NOBLOCK)
            except zmq.Again:
                return
            self._handle(sender[0] if sender else b"", self._decode(data))


def bind(context: zmq.Context[zmq.Socket[bytes]], endpoint: str) -> zmq.Socket[bytes]:
    """The owner's socket."""
    socket: zmq.Socket[bytes] = context.socket(zmq.ROUTER)
    _unbounded(socket)
    socket.bind(endpoint)
    return socket


def connect(context: zmq.Context[zmq.Socket[bytes]], endpoint: str, identity: bytes) -> zmq.Socket[bytes]:
    """A worker's socket."""
    socket: zmq.Socket[bytes] = context.socket(zmq.DEALER)
    _unbounded(socket)
    socket.setsockopt(zmq.IDENTITY, identity)
    socket.connect(endpoint)
    return socket


def _unbounded(socket: zmq.Socket[bytes]) -> None:
    socket.setsockopt(zmq.SNDHWM, 0)
    socket.setsockopt(zmq.RCVHWM, 0)
