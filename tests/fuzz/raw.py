"""Connections that misbehave below JSON: broken HTTP, wrong lengths, floods, pipelines, drips, clients that leave."""

from __future__ import annotations

import gzip
import zlib
from collections.abc import Callable, Sequence
from itertools import pairwise
from random import Random

from tests.fuzz.bodies import CHAT, COMPLETIONS, body, simple
from tests.fuzz.case import Case, Send
from tests.fuzz.message import CLOSE, HOST, JSON_TYPE, chunked, garbled, get, post, request
from tests.fuzz.odd import METHODS, ODD_HEADERS, PATHS

Make = Callable[[Random, str], Case]


def _case(kind: str, name: str, *sends: bytes | Send, **options: object) -> Case:
    steps = tuple(send if isinstance(send, Send) else Send(send) for send in sends)
    return Case(name, kind, steps, **options)  # type: ignore[arg-type]


def json_body(rng: Random, name: str) -> Case:
    """A body, sent properly; sometimes with odd headers around it."""
    path, data = body(rng)
    headers = []
    if rng.random() < 0.15:
        headers.append(rng.choice(ODD_HEADERS))
    if rng.random() < 0.05:
        lines = [HOST, JSON_TYPE, CLOSE, "Transfer-Encoding: chunked", *headers]
        return _case("body", name, request("POST", path, lines, chunked(rng, data)))
    return _case("body", name, post(path, data, *headers))


def other_route(rng: Random, name: str) -> Case:
    path, method = rng.choice(PATHS), rng.choice([*METHODS, *["GET"] * 9])
    # Where the request line itself is broken the server may just close the connection.
    headers = [rng.choice(ODD_HEADERS)] if rng.random() < 0.2 else []
    proper = method in METHODS[:6] and path.startswith("/") and path.isascii()
    return _case("route", name, get(path, *headers, method=method), methods=(method,), must_answer=proper)


def content_type(rng: Random, name: str) -> Case:
    path, data = simple(rng, stream=False)
    kinds = [
        "text/plain",
        "",
        "application/json; charset=utf-8",
        "application/json; charset=utf-7",
        "a",
        "application/xml",
    ]
    kinds += ["application/json; charset=nonsense", "multipart/form-data", "application/x-www-form-urlencoded", "é/ü"]
    lines = [HOST, CLOSE, f"Content-Length: {len(data)}"]
    lines += [f"Content-Type: {rng.choice(kinds)}" for _ in range(rng.choice([0, 1, 1, 1, 2]))]
    return _case("content type", name, request("POST", path, lines, data))


def content_encoding(rng: Random, name: str) -> Case:
    """Compressed bodies, some of them not what they say, some of them larger inside than the server accepts."""
    path, data = simple(rng, stream=False)
    inflated = data if rng.random() < 0.7 else data[:-1] + b" " * 2_000_000 + data[-1:]
    packings = [("gzip", gzip.compress(inflated)), ("deflate", zlib.compress(inflated))]
    packings += [(said, data) for said in ("gzip", "deflate", "br", "zstd", "x", "identity")]
    encoding, packed = rng.choice([*packings, ("gzip, gzip", gzip.compress(data))])
    if rng.random() < 0.3:
        packed = garbled(rng, packed)
    return _case("content encoding", name, post(path, packed, f"Content-Encoding: {encoding}"), must_answer=False)


def wrong_length(rng: Random, name: str) -> Case:
    path, data = simple(rng, stream=rng.random() < 0.5)
    length = len(data)
    values = [
        length - 1,
        length + 1,
        0,
        -1,
        2**31,
        2**63,
        2**64,
        10**100,
        "",
        "+5",
        "0x10",
        "1e3",
        "five",
        " 5",
        "5 5",
        "٣",
    ]
    lines = [HOST, JSON_TYPE, CLOSE, f"Content-Length: {rng.choice(values)}"]
    if rng.random() < 0.3:
        lines.append(rng.choice([f"Content-Length: {length}", "Transfer-Encoding: chunked", "Transfer-Encoding: x"]))
    return _case("wrong length", name, request("POST", path, lines, data), must_answer=False)


def broken_chunks(rng: Random, name: str) -> Case:
    path, data = simple(rng, stream=rng.random() < 0.5)
    good = chunked(rng, data)
    bad = [
        b"x\r\n" + data,
        b"-1\r\n" + data,
        b"ffffffffffffffffff\r\n" + data,
        good[: len(good) // 2],
        good[:-2],
        b"\r\n",
    ]
    bad += [
        b"5\r\nabcdefgh\r\n0\r\n\r\n",
        b"0\r\n" + b"A: b\r\n" * 500 + b"\r\n",
        b"1;" + b"x" * 20000 + b"\r\na\r\n0\r\n\r\n",
    ]
    bad += [b"5\nabcde\n0\n\n", garbled(rng, good), good + good]
    lines = [
        HOST,
        JSON_TYPE,
        CLOSE,
        f"Transfer-Encoding: {rng.choice(['chunked', 'chunked', 'Chunked', 'gzip, chunked'])}",
    ]
    return _case("broken chunks", name, request("POST", path, lines, rng.choice(bad)), must_answer=False)


def truncated(rng: Random, name: str) -> Case:
    path, data = simple(rng, stream=rng.random() < 0.5)
    whole = post(path, data)
    cut = whole[: rng.randrange(len(whole))]
    return _case("truncated", name, cut, must_answer=False, reset=rng.random() < 0.5)


def stalled(rng: Random, name: str) -> Case:
    """Stops in the middle and waits for what the server does about it."""
    path, data = simple(rng, stream=False)
    whole = post(path, data)
    return _case("stalled", name, whole[: rng.randrange(1, len(whole))], must_answer=True, waits=True)


def garbled_head(rng: Random, name: str) -> Case:
    path, data = simple(rng, stream=rng.random() < 0.5)
    whole = post(path, data) if rng.random() < 0.7 else get(rng.choice(PATHS))
    return _case("garbled", name, garbled(rng, whole, 8), must_answer=False)


def not_http(rng: Random, name: str) -> Case:
    greetings = [
        b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n",
        b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03" + rng.randbytes(200),
    ]
    greetings += [
        rng.randbytes(rng.choice([1, 20, 2000, 70000])),
        b"\r\n" * 2000,
        b"\x00" * 999,
        b"GET /health\r\n\r\n",
    ]
    greetings += [
        b"GET /health HTTP/9.9\r\n\r\n",
        b"GET  /health  HTTP/1.1\r\n\r\n",
        b"GET /health HTTP/1.1\n\n",
        b" \r\n\r\n",
    ]
    greetings += [
        b"SSH-2.0-x\r\n",
        b"EHLO a\r\n",
        b"GET /health HTTP/1.1\r\n folded\r\nA: b\r\n c\r\n\r\n",
        b"G" * 9000,
    ]
    return _case("not HTTP", name, rng.choice(greetings), methods=("GET",), must_answer=False)


def headers(rng: Random, name: str) -> Case:
    """Floods and headers that no client sends."""
    flood = rng.choice(["A: b", "X: " + "y" * 500, "X-" + "z" * 50 + ": 1", "Content-Length: 0", "Connection: close"])
    lines = [flood] * rng.choice([50, 200, 5000])
    lines = rng.choice(
        [lines, ["X: " + "y" * 100_000], ["X" * 20_000 + ": y"], ["A: \0"], ["A\0: b"], [": b"], ["A"], ["A:\rb"]]
    )
    lines = rng.choice(
        [lines, lines, ["Host: a", "Host: b"], ["Upgrade: websocket", "Connection: Upgrade"], ["Expect: x"]]
    )
    sent = request("GET", "/health", [HOST, CLOSE, *lines])
    return _case("headers", name, sent, methods=("GET",), must_answer=False)


def http10(rng: Random, name: str) -> Case:
    path, data = simple(rng, stream=rng.random() < 0.6)
    lines = [JSON_TYPE, f"Content-Length: {len(data)}", *rng.choice([[], [HOST], [CLOSE]])]
    return _case("HTTP/1.0", name, request("POST", path, lines, data, version="HTTP/1.0"))


def pipelined(rng: Random, name: str) -> Case:
    """Several requests at once on one connection; the last asks to close it, or is broken."""
    parts: list[bytes] = []
    methods: list[str] = []
    for _ in range(rng.randint(2, 5)):
        if rng.random() < 0.5:
            parts.append(get(rng.choice(PATHS[:9]), close=False))
            methods.append("GET")
        else:
            parts.append(post(*simple(rng, stream=rng.random() < 0.5), close=False))
            methods.append("POST")
    last = get("/health") if rng.random() < 0.7 else garbled(rng, get("/health"), 8)
    sent = b"".join([*parts, last])
    sends = [Send(sent)] if rng.random() < 0.5 else [Send(part, 0.002) for part in _pieces(rng, sent, 6)]
    return _case("pipelined", name, *sends, methods=(*methods, "GET"))


def dripped(rng: Random, name: str) -> Case:
    """A proper request a few bytes at a time, half a second in all."""
    path, data = simple(rng, stream=rng.random() < 0.5)
    pieces = _pieces(rng, post(path, data), rng.choice([3, 20, 60]))
    return _case("dripped", name, *(Send(piece, 0.5 / len(pieces)) for piece in pieces))


def leaves(rng: Random, name: str) -> Case:
    """A proper request whose client goes away: at once, or somewhere in the answer."""
    stream = rng.random() < 0.75
    path, data = simple(rng, stream=stream, max_tokens=rng.choice([1, 8, 40, 90]))
    after = rng.choice([0, 0, 1, 200, 300, 500, 1000, 5000])
    return _case("leaves", name, post(path, data), leave_after=after, reset=rng.random() < 0.5)


def leaves_while_sending(rng: Random, name: str) -> Case:
    path, data = simple(rng, stream=True)
    whole = post(path, data)
    pieces = _pieces(rng, whole[: rng.randrange(1, len(whole))], 4)
    sends = [Send(piece, rng.choice([0, 0.005])) for piece in pieces]
    return _case("leaves", name, *sends, leave_after=0, reset=rng.random() < 0.5, must_answer=False)


def large(rng: Random, name: str) -> Case:
    """Bodies about as large as the server accepts, and larger."""
    filler = rng.choice([b"a", b"\xe6\x97\xa5", b"\\u0041", b"\\ud800", b" the"])
    size = rng.choice([10_000, 200_000, 262_000, 262_144, 262_200, 300_000, 2_000_000])
    text = filler * (size // len(filler))
    if rng.random() < 0.5:
        return _case("large", name, post(COMPLETIONS, b'{"max_tokens":1,"prompt":"' + text + b'"}'))
    data = b'{"max_tokens":1,"messages":[{"role":"user","content":"' + text + b'"}]}'
    return _case("large", name, post(CHAT, data))


def _pieces(rng: Random, data: bytes, count: int) -> Sequence[bytes]:
    cuts = sorted({0, len(data), *(rng.randrange(len(data)) for _ in range(count - 1))})
    return [data[start:end] for start, end in pairwise(cuts)]


KINDS: list[tuple[float, Make]] = [
    (62, json_body),
    (8, other_route),
    (2, content_type),
    (2, content_encoding),
    (3, wrong_length),
    (3, broken_chunks),
    (2.4, truncated),
    (0.1, stalled),
    (3, garbled_head),
    (2, not_http),
    (2, headers),
    (1.5, http10),
    (3, pipelined),
    (0.5, dripped),
    (4, leaves),
    (1, leaves_while_sending),
    (0.5, large),
]


def make_case(seed: int, index: int) -> Case:
    """Case `index` of the run with this seed: the same one whatever ran before it."""
    rng = Random(f"{seed}/{index}")
    make = rng.choices([make for _, make in KINDS], [weight for weight, _ in KINDS])[0]
    return make(rng, f"seed {seed}, case {index}")
