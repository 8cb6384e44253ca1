"""HTTP/1.1 requests as bytes."""

from __future__ import annotations

from random import Random

HOST = "Host: fuzz"
JSON_TYPE = "Content-Type: application/json"
CLOSE = "Connection: close"


def request(method: str, path: str, headers: list[str], body: bytes = b"", *, version: str = "HTTP/1.1") -> bytes:
    """With exactly these header lines."""
    head = "\r\n".join([f"{method} {path} {version}", *headers, "", ""])
    return head.encode("utf-8", "surrogateescape") + body


def post(path: str, body: bytes, *headers: str, close: bool = True) -> bytes:
    """A proper request with a JSON body."""
    lines = [HOST, JSON_TYPE, f"Content-Length: {len(body)}", *([CLOSE] if close else []), *headers]
    return request("POST", path, lines, body)


def get(path: str, *headers: str, method: str = "GET", close: bool = True) -> bytes:
    """A proper request without a body."""
    return request(method, path, [HOST, *([CLOSE] if close else []), *headers])


def chunked(rng: Random, body: bytes) -> bytes:
    """The body in chunks of any size (RFC 9112, section 7.1), now and then with extensions and trailers."""
    parts = []
    while body:
        size = rng.choice([1, 2, 7, 100, 4096])
        extension = rng.choice([b"", b"", b";a=b", b';x="y"'])
        parts.append(b"%x%b\r\n%b\r\n" % (len(body[:size]), extension, body[:size]))
        body = body[size:]
    return b"".join(parts) + b"0\r\n" + rng.choice([b"", b"X-Trailer: 1\r\n"]) + b"\r\n"


def garbled(rng: Random, data: bytes, most: int = 4) -> bytes:
    """A few bytes changed, dropped, doubled or put in."""
    changed = bytearray(data)
    for _ in range(rng.randint(1, most)):
        at = rng.randrange(len(changed) + 1)
        action = rng.randrange(4)
        if action == 0 and at < len(changed):
            changed[at] = rng.randrange(256)
        elif action == 1:
            del changed[at : at + rng.randint(1, 8)]
        elif action == 2:
            changed[at:at] = changed[at : at + rng.randint(1, 16)]
        else:
            changed[at:at] = rng.choice([b"\x00", b"\r\n", b"\n", b" ", b"\xff", b'"', b"{", b"}", b"\\u", b"\r"])
    return bytes(changed)
