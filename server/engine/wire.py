"""Messages over Unix stream sockets between the processes of one server: (kind, payload), both bytes.

    uint32 length of what follows | uint8 length of kind | kind | payload        (little-endian)

A plain socket and no library with a thread of its own: on the path of every token each thread that has to be woken
costs more than the token's text. Who connects says its identity first; whose connection ends is reported as `GONE`.
"""

from __future__ import annotations

import asyncio
import selectors
import socket
import struct
from collections.abc import Callable
from pathlib import Path

from server.engine.kinds import GONE

_HEAD = struct.Struct("<IB")
_READ_BYTES = 256 * 1024
MAX_PATH_BYTES = 100
"""Of a socket's path; the system's limit is 104 to 108."""

Message = tuple[bytes, bytes]


class Frames:
    """Cuts a stream of bytes into messages."""

    def __init__(self) -> None:
        self._buffer = bytearray()

    def feed(self, data: bytes) -> list[Message]:
        """The messages that `data` completes, each of them once."""
        buffer = self._buffer
        buffer += data
        messages: list[Message] = []
        at = 0
        while len(buffer) - at >= _HEAD.size:
            length, kind_length = _HEAD.unpack_from(buffer, at)
            end = at + 4 + length
            if len(buffer) < end:
                break
            payload_at = at + _HEAD.size + kind_length
            messages.append((bytes(buffer[at + _HEAD.size : payload_at]), bytes(buffer[payload_at:end])))
            at = end
        if at:
            del buffer[:at]
        return messages


def frame(kind: bytes, payload: bytes) -> bytes:
    """One message as it is sent."""
    return _HEAD.pack(1 + len(kind) + len(payload), len(kind)) + kind + payload


class _Out:
    """What a socket has not taken yet."""

    def __init__(self, sock: socket.socket) -> None:
        self._socket = sock
        self._rest = bytearray()

    def send(self, data: bytes) -> bool:
        """Sends now what fits; whether nothing is left. A peer that is gone takes everything."""
        if self._rest:
            self._rest += data
            return False
        try:
            sent = self._socket.send(data)
        except BlockingIOError:
            sent = 0
        except OSError:  # the reading side learns it too, and ends the connection
            return True
        if sent == len(data):
            return True
        self._rest += data[sent:]
        return False

    def flush(self) -> bool:
        """Goes on; whether nothing is left."""
        rest, self._rest = self._rest, bytearray()
        return self.send(bytes(rest)) if rest else True


class Line:
    """The connecting end, on the running event loop. `handle(kind, payload)` is called for every message.

    Raises OSError where nobody listens at `path`.
    """

    def __init__(self, path: str, identity: bytes, handle: Callable[[bytes, bytes], None]) -> None:
        self._loop = asyncio.get_running_loop()
        self._handle = handle
        self._frames = Frames()
        self._socket = _connected(path)
        self._fd = self._socket.fileno()
        self._out = _Out(self._socket)
        self._closed = self._deaf = False
        self._loop.add_reader(self._fd, self._receive)
        self.send(b"", identity)

    def send(self, kind: bytes, payload: bytes) -> None:
        """Never blocks: what does not fit is sent later."""
        if not self._closed and not self._out.send(frame(kind, payload)):
            self._loop.add_writer(self._fd, self._flush)

    def stop_reading(self) -> None:
        """What comes from now on, or has come and is not handled yet, stays unread."""
        self._deaf = True
        self._loop.remove_reader(self._fd)

    def close(self) -> None:
        if not self._closed:
            self._closed = True
            self._loop.remove_reader(self._fd)
            self._loop.remove_writer(self._fd)
            self._socket.close()

    def _flush(self) -> None:
        if self._out.flush():
            self._loop.remove_writer(self._fd)

    def _receive(self) -> None:
        try:
            data = self._socket.recv(_READ_BYTES)
        except BlockingIOError:
            return
        except OSError:
            data = b""
        if not data:  # the peer is gone; what that means is its supervisor's to say
            self._loop.remove_reader(self._fd)
            return
        for kind, payload in self._frames.feed(data):
            if self._deaf or self._closed:
                return
            self._handle(kind, payload)


def _connected(path: str) -> socket.socket:
    sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    try:
        sock.connect(path)
    except OSError as error:
        sock.close()
        raise OSError(f"nobody listens at {path!r}: {error.strerror}") from error
    sock.setblocking(False)
    return sock


class _Peer:
    def __init__(self, sock: socket.socket) -> None:
        self.socket = sock
        self.frames = Frames()
        self.out = _Out(sock)
        self.identity: bytes | None = None


class Hub:
    """The listening end: many peers, read by whoever calls `receive`. No event loop of its own."""

    def __init__(self, path: str) -> None:
        if len(path.encode()) > MAX_PATH_BYTES:
            raise OSError(f"the socket's path {path!r} is too long for the system; set TMPDIR to a shorter folder")
        self._path = path
        self._peers: dict[bytes, _Peer] = {}
        self._selector = selectors.DefaultSelector()
        self._listener = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        self._listener.bind(path)
        self._listener.listen(64)
        self._listener.setblocking(False)
        self._selector.register(self._listener, selectors.EVENT_READ, None)

    def poll(self, timeout_ms: float) -> bool:
        """Whether `receive` has something to look at, after at most `timeout_ms`."""
        return bool(self._selector.select(timeout_ms / 1e3))

    def receive(self) -> list[tuple[bytes, bytes, bytes]]:
        """(identity, kind, payload) of every message that is there."""
        messages: list[tuple[bytes, bytes, bytes]] = []
        for key, events in self._selector.select(0):
            peer: _Peer | None = key.data
            if peer is None:
                self._accept()
                continue
            if events & selectors.EVENT_WRITE and peer.out.flush():
                self._selector.modify(peer.socket, selectors.EVENT_READ, peer)
            if events & selectors.EVENT_READ:
                self._read(peer, messages)
        return messages

    def send(self, identity: bytes, kind: bytes, payload: bytes) -> None:
        """To the peer with this identity; one that is gone is ignored. Never blocks."""
        peer = self._peers.get(identity)
        if peer is not None and not peer.out.send(frame(kind, payload)):
            self._selector.modify(peer.socket, selectors.EVENT_READ | selectors.EVENT_WRITE, peer)

    def fileno(self) -> int:
        """Readable when `receive` has something to look at."""
        return self._selector.fileno()

    def close(self) -> None:
        for key in list(self._selector.get_map().values()):
            self._selector.unregister(key.fileobj)
            key.fileobj.close()  # type: ignore[union-attr]
        self._selector.close()
        Path(self._path).unlink(missing_ok=True)

    def _accept(self) -> None:
        connection, _ = self._listener.accept()
        connection.setblocking(False)
        self._selector.register(connection, selectors.EVENT_READ, _Peer(connection))

    def _read(self, peer: _Peer, messages: list[tuple[bytes, bytes, bytes]]) -> None:
        try:
            data = peer.socket.recv(_READ_BYTES)
        except BlockingIOError:
            return
        except OSError:
            data = b""
        if not data:
            self._selector.unregister(peer.socket)
            peer.socket.close()
            if peer.identity is not None and self._peers.get(peer.identity) is peer:
                del self._peers[peer.identity]
                messages.append((peer.identity, GONE, b""))
            return
        for kind, payload in peer.frames.feed(data):
            if peer.identity is None:
                peer.identity = payload
                self._peers[payload] = peer
            else:
                messages.append((peer.identity, kind, payload))
