"""The requests of a soak, good and bad."""

from __future__ import annotations

import asyncio
import json
from dataclasses import dataclass
from typing import Any
from urllib.parse import urlsplit

import aiohttp
import numpy as np

from loadtest.client import Client
from loadtest.plan import Bodies, Server, session_source
from loadtest.record import Record
from loadtest.settings import Settings
from loadtest.soak.ways import ANSWERED, LEFT, REJECTED, UNDEFINED, End, Outages, way_of_status, way_of_stream
from loadtest.workload import NORMAL, Behaviour

SHARES = {
    "stream": 0.40,
    "whole": 0.12,
    "cancel": 0.14,
    "vanish": 0.08,
    "slow": 0.04,
    "oversize": 0.06,
    "malformed": 0.12,
    "half": 0.04,
}
"""Kinds of requests: read to the end; not streamed; left at a token; left before any; read slowly; longer than any
context or body; no request that makes sense; ended in the middle of its body."""

_HUGE_TOKENS = 100_000_000
_HUGE_BYTES = 3_000_000
_SLOW_BYTES_PER_S = 2000.0
_VANISH_S = 0.2


@dataclass(frozen=True, slots=True)
class Wrong:
    """A request that must be rejected."""

    method: str
    path: str
    data: bytes
    content_type: str = "application/json"


def wrong_requests(path: str, body: dict[str, Any]) -> list[Wrong]:
    """Requests to `path` that no server should take, made from one that it takes."""
    bad_fields: list[dict[str, Any]] = [
        {"max_tokens": -1},
        {"max_tokens": "many"},
        {"temperature": -3},
        {"temperature": "hot"},
        {"messages": 3, "prompt": {}},
        {"messages": [{"role": "nobody"}], "prompt": [[]]},
        {"model": "no such model"},
    ]
    return [
        *(Wrong("POST", path, data) for data in (b"", b"{", b"[]", b"null", b'{"a":' * 2000, b"\xff\xfe\x00")),
        *(Wrong("POST", path, json.dumps(body | fields).encode()) for fields in bad_fields),
        Wrong("POST", path, json.dumps(body).encode(), "text/plain"),
        Wrong("POST", "/v1/no/such/route", b"{}"),
        Wrong("GET", path, b""),
    ]


class Traffic:
    """Sends one request of a kind and says how it ended."""

    def __init__(self, settings: Settings, server: Server, http: aiohttp.ClientSession, started: float) -> None:
        self._settings, self._http = settings, http
        self._bodies = Bodies(settings.target, settings.asked, server, settings.seed)
        self._sessions = enumerate(session_source(settings.asked, server.scale, settings.seed))
        self._client = Client(http, self._bodies.url, server.way, settings.target.timeout_s, started)
        self._random = np.random.default_rng([settings.seed, 8])
        self.outages = Outages()
        self.ends: list[End] = []
        self.begun = 0

    @property
    def now(self) -> float:
        """Seconds since the start."""
        return self._client.now()

    def pick(self) -> str:
        """A kind, by its share."""
        return str(self._random.choice(list(SHARES), p=np.asarray(list(SHARES.values())) / sum(SHARES.values())))

    async def send(self, kind: str, *, max_tokens: int | None = None) -> End:
        """One request; its end is written down as well."""
        self.begun += 1
        sent = self.now
        body = self._body(max_tokens)
        try:
            async with asyncio.timeout(self._settings.target.timeout_s + 5):
                end = await self._send(kind, body)
        except (aiohttp.ClientError, OSError, TimeoutError) as error:
            way, seen = UNDEFINED, f"{type(error).__name__}: {error}"
            end = End(kind, way, seen, sent, self.now)
        self.ends.append(end)
        return end

    def _body(self, max_tokens: int | None) -> dict[str, Any]:
        number, session = next(self._sessions)
        turn = session.turns[0]
        body = self._bodies.body(number, 0, turn, list(turn.messages))
        return body if max_tokens is None else body | {"max_tokens": max_tokens}

    async def _send(self, kind: str, body: dict[str, Any]) -> End:
        if kind == "whole":
            return await self._whole(body)
        if kind == "vanish":
            return await self._vanish(body)
        if kind == "half":
            return await self._half(body)
        if kind in ("malformed", "oversize"):
            return await self._wrong(kind, body)
        return await self._stream(kind, body)

    async def _stream(self, kind: str, body: dict[str, Any]) -> End:
        behaviour = NORMAL
        if kind == "cancel":
            behaviour = Behaviour(cancel_after=int(self._random.integers(1, max(2, body.get("max_tokens", 16)))))
        elif kind == "slow":
            behaviour = Behaviour(bytes_per_s=_SLOW_BYTES_PER_S)
        record = Record(self.now)
        await self._client.ask(body, record, behaviour)
        way, seen = way_of_stream(record, self.outages)
        first = record.times[0] if record.times else None
        return End(kind, way, seen, record.sent, record.ended, first)

    async def _whole(self, body: dict[str, Any]) -> End:
        own = {name: value for name, value in body.items() if name != "stream_options"} | {"stream": False}
        return await self._plain("whole", Wrong("POST", self._path, json.dumps(own).encode()), wrong=False)

    async def _wrong(self, kind: str, body: dict[str, Any]) -> End:
        if kind == "oversize":
            huge: list[dict[str, Any]] = [
                body | {"max_tokens": _HUGE_TOKENS},
                body | {"messages": [{"role": "user", "content": "word " * (_HUGE_BYTES // 5)}]},
            ]
            choices = [Wrong("POST", self._path, json.dumps(one).encode()) for one in huge]
            if "prompt" in body:
                choices.pop()
        else:
            choices = wrong_requests(self._path, body)
        return await self._plain(kind, choices[int(self._random.integers(len(choices)))], wrong=True)

    @property
    def _path(self) -> str:
        return urlsplit(self._bodies.url).path

    async def _plain(self, kind: str, asked: Wrong, *, wrong: bool) -> End:
        sent, url = self.now, self._bodies.url.removesuffix(self._path) + asked.path
        headers = {"Content-Type": asked.content_type}
        try:
            async with self._http.request(asked.method, url, data=asked.data, headers=headers) as response:
                data = await response.read()
        except (aiohttp.ServerDisconnectedError, aiohttp.ClientOSError) as error:
            # A body that is refused while it is being sent may end in a reset connection: RFC 9112, section 9.6.
            way = REJECTED if kind == "oversize" else UNDEFINED
            return End(kind, way, f"{type(error).__name__}: {error}", sent, self.now)
        away = self.outages.overlap(sent, self.now)
        way = way_of_status(response.status, _is_error(data), wrong, away)
        if way == ANSWERED and b'"finish_reason"' not in data:
            way = UNDEFINED
        seen = f"http_{response.status}" + (f" {data[:100]!r} to {asked.data[:60]!r}" if way == UNDEFINED else "")
        return End(kind, way, seen, sent, self.now)

    async def _vanish(self, body: dict[str, Any]) -> End:
        """Closes its connection at a random moment, most likely before the first token."""
        sent, seen = self.now, "left"
        try:
            async with asyncio.timeout(float(self._random.random()) * _VANISH_S):
                async with self._http.post(self._bodies.url, data=json.dumps(body)) as response:
                    await response.content.readany()
                    response.close()
                    seen = f"http_{response.status}"
        except (TimeoutError, aiohttp.ClientError, OSError):
            pass  # the end that was wanted
        return End("vanish", LEFT, seen, sent, self.now)

    async def _half(self, body: dict[str, Any]) -> End:
        """Announces a body, sends half of it and goes."""
        sent, parts = self.now, urlsplit(self._bodies.url)
        data = json.dumps(body).encode()
        port = parts.port or (443 if parts.scheme == "https" else 80)
        secure = True if parts.scheme == "https" else None
        _, writer = await asyncio.open_connection(parts.hostname, port, ssl=secure)
        head = f"POST {parts.path} HTTP/1.1\r\nHost: {parts.netloc}\r\nContent-Type: application/json\r\n"
        writer.write(f"{head}Content-Length: {len(data)}\r\n\r\n".encode() + data[: len(data) // 2])
        await writer.drain()
        writer.close()
        return End("half", LEFT, "left", sent, self.now)


def _is_error(data: bytes) -> bool:
    """Whether a body is the error object of the API."""
    try:
        error = json.loads(data)["error"]
    except (ValueError, KeyError, TypeError):
        return False
    return bool(error["message"] if isinstance(error, dict) else error)
