"""Listening sockets: who may have a port, and what is said where it cannot be had."""

from __future__ import annotations

import errno
import socket

import pytest

from server.api import sockets


def test_a_port_in_use_is_told_even_where_it_could_be_shared() -> None:
    (first,) = sockets.reserve("127.0.0.1", 0)
    port = sockets.port_of(first)
    (worker,) = sockets.bind("127.0.0.1", port, shared=True)
    assert sockets.port_of(worker) == port
    worker.listen()
    try:
        with pytest.raises(OSError, match=f"port {port} on 127.0.0.1 is in use"):
            sockets.reserve("127.0.0.1", port)
    finally:
        first.close()
        worker.close()


def test_every_address_of_a_host_has_the_same_port(monkeypatch: pytest.MonkeyPatch) -> None:
    addresses = [(socket.AF_INET, socket.SOCK_STREAM, 6, "", (f"127.0.0.{i}", 0)) for i in (1, 2, 1)]
    monkeypatch.setattr(socket, "getaddrinfo", lambda *_, **__: addresses)
    bound = sockets.bind("both", 0)
    assert len(bound) == 2
    assert len({sockets.port_of(listener) for listener in bound}) == 1
    for listener in bound:
        listener.close()


def test_the_send_buffer_is_bounded() -> None:
    (listener,) = sockets.bind("127.0.0.1", 0)
    assert listener.getsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF) <= 2 * sockets.SEND_BUFFER_BYTES  # Linux doubles it
    listener.close()


def test_a_privileged_port_says_so() -> None:
    line = sockets._explained("127.0.0.1", 80, PermissionError(errno.EACCES, "Permission denied"))
    assert line.startswith("port 80 on 127.0.0.1 needs privileges")


@pytest.mark.parametrize(
    ("host", "tls", "url"),
    [
        ("127.0.0.1", False, "http://127.0.0.1:7"),
        ("0.0.0.0", True, "https://127.0.0.1:7"),
        ("::", False, "http://[::1]:7"),
        ("localhost", False, "http://localhost:7"),
    ],
)
def test_the_url_is_one_that_a_client_can_use(host: str, tls: bool, url: str) -> None:
    assert sockets.url_of(host, 7, tls=tls) == url
