"""Listening sockets: bound before anything is loaded, so that a port in use is told at once."""

from __future__ import annotations

import errno
import socket
from contextlib import suppress

SEND_BUFFER_BYTES = 64 * 1024
"""The kernel would buffer megabytes for a client that reads nothing; what it holds nobody can count or stop."""


class BindError(OSError):
    """The address cannot be had; the message is one line on why and what to do."""


def bind(host: str, port: int, *, shared: bool = False) -> list[socket.socket]:
    """Sockets on every address of `host`, all on one port (0: any free one). Not yet listening.

    `shared` lets other processes of the same user bind the port too (SO_REUSEPORT). Raises BindError.
    """
    bound: list[socket.socket] = []
    try:
        for family, address in _addresses(host, port):
            listener = socket.socket(family, socket.SOCK_STREAM)
            bound.append(listener)
            listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            listener.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, SEND_BUFFER_BYTES)
            if shared:
                listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, 1)
            if family == socket.AF_INET6:
                with suppress(OSError):
                    listener.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 1)
            listener.setblocking(False)
            listener.bind((address, port or port_of(bound[0])))
    except OSError as error:
        for listener in bound:
            listener.close()
        raise BindError(_explained(host, port, error)) from error
    return bound


def reserve(host: str, port: int) -> list[socket.socket]:
    """Sockets that hold the port for processes that share it, and that nobody else has bound. Raises BindError."""
    for probe in bind(host, port):  # SO_REUSEPORT alone would join whoever is there already
        port = port or port_of(probe)
        probe.close()
    return bind(host, port, shared=True)


def port_of(listener: socket.socket) -> int:
    """The port that a socket is bound to; 0 if it is not."""
    port: int = listener.getsockname()[1]
    return port


def url_of(host: str, port: int, *, tls: bool) -> str:
    """Where clients find it. An address that means all of them is shown as the loopback's."""
    shown = {"0.0.0.0": "127.0.0.1", "::": "::1", "": "127.0.0.1"}.get(host, host)
    return f"{'https' if tls else 'http'}://{f'[{shown}]' if ':' in shown else shown}:{port}"


def _addresses(host: str, port: int) -> list[tuple[socket.AddressFamily, str]]:
    found = socket.getaddrinfo(host or None, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)
    return list(dict.fromkeys((family, str(address[0])) for family, _, _, _, address in found))


def _explained(host: str, port: int, error: OSError) -> str:
    if error.errno == errno.EADDRINUSE:
        return f"port {port} on {host} is in use; choose another with --port (0: any free port)"
    if error.errno == errno.EACCES:
        return f"port {port} on {host} needs privileges that this process does not have; choose one above 1023"
    return f"cannot listen on {host}:{port}: {error.strerror or error}"
