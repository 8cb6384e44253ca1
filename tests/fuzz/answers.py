"""Reads answers off a connection and says what is wrong with them."""

from __future__ import annotations

import asyncio
import json
from dataclasses import dataclass
from typing import Any, NoReturn

ERROR_KEYS = {"message", "type", "param", "code"}
MAX_BODY_BYTES = 64 * 2**20


class BadAnswerError(Exception):
    """The server broke a promise; the message says which."""


@dataclass(frozen=True, slots=True)
class Answer:
    """One complete answer; header names are in lower case."""

    status: int
    headers: dict[str, str]
    body: bytes


async def read_answer(reader: asyncio.StreamReader, method: str, first: bytes = b"") -> Answer:
    """An answer of which the first byte may have been read already. Raises BadAnswerError where it breaks off."""
    status, headers = await _head(reader, first)
    while status < 200:
        if status != 100:
            raise BadAnswerError(f"an interim answer {status}")
        status, headers = await _head(reader, b"")
    try:
        return Answer(status, headers, await _body(reader, method, status, headers))
    except asyncio.IncompleteReadError:
        raise BadAnswerError(f"an answer with status {status} breaks off") from None


async def _head(reader: asyncio.StreamReader, first: bytes) -> tuple[int, dict[str, str]]:
    try:
        raw = first + await reader.readuntil(b"\r\n\r\n")
    except asyncio.IncompleteReadError as error:
        raise BadAnswerError(f"an answer's head breaks off: {error.partial[:200]!r}") from None
    except asyncio.LimitOverrunError:
        raise BadAnswerError("an answer's head has no end") from None
    line, *fields = raw[:-4].decode("latin-1").split("\r\n")
    version, _, rest = line.partition(" ")
    if version not in ("HTTP/1.1", "HTTP/1.0") or not rest[:3].isdigit():
        raise BadAnswerError(f"no status line: {line[:200]!r}")
    headers: dict[str, str] = {}
    for field in fields:
        name, colon, value = field.partition(":")
        if not colon or not name or name != name.strip() or "\n" in field:
            raise BadAnswerError(f"no header line: {field[:200]!r}")
        headers[name.lower()] = value.strip()
    return int(rest[:3]), headers


async def _body(reader: asyncio.StreamReader, method: str, status: int, headers: dict[str, str]) -> bytes:
    if method == "HEAD" or status in (204, 304):
        return b""
    if headers.get("transfer-encoding") == "chunked":
        return await _chunks(reader)
    if "content-length" in headers:
        length = int(headers["content-length"])
        if length > MAX_BODY_BYTES:
            raise BadAnswerError(f"an answer of {length} bytes")
        return await reader.readexactly(length)
    return await reader.read(-1)


async def _chunks(reader: asyncio.StreamReader) -> bytes:
    parts = []
    while True:
        line = await reader.readuntil(b"\r\n")
        try:
            size = int(line, 16)
        except ValueError:
            raise BadAnswerError(f"no chunk size: {line[:100]!r}") from None
        parts.append(await reader.readexactly(size))
        if await reader.readexactly(2) != b"\r\n":
            raise BadAnswerError("a chunk is longer than it says")
        if size == 0:
            return b"".join(parts)


def check_answer(answer: Answer, method: str) -> None:
    """Raises BadAnswerError: a server error, an error in another shape than OpenAI's, a stream without an end."""
    kind = answer.headers.get("content-type", "").split(";")[0]
    if answer.status >= 500:
        raise BadAnswerError(f"status {answer.status}: {answer.body[:500]!r}")
    if answer.status < 200 or 300 <= answer.status < 400:
        raise BadAnswerError(f"status {answer.status}")
    if method == "HEAD" or answer.status == 204:
        return
    if answer.status >= 400:
        if kind != "application/json":
            raise BadAnswerError(f"an error {answer.status} as {kind!r}: {answer.body[:200]!r}")
        check_error(_json(answer.body))
    elif kind == "text/event-stream":
        check_stream(answer.body)
    elif kind == "application/json":
        _json(answer.body)
    else:
        _text(answer.body)


def check_error(value: Any) -> None:
    """OpenAI's shape: exactly four keys, of the right types."""
    error = value.get("error") if isinstance(value, dict) and value.keys() == {"error"} else None
    if not isinstance(error, dict) or error.keys() != ERROR_KEYS:
        raise BadAnswerError(f"no error in OpenAI's shape: {str(value)[:300]}")
    wrong = not isinstance(error["message"], str) or not error["message"] or not isinstance(error["type"], str)
    if wrong or not all(error[key] is None or isinstance(error[key], str) for key in ("param", "code")):
        raise BadAnswerError(f"an error whose keys have wrong types: {str(error)[:300]}")


def check_stream(body: bytes) -> None:
    """Events of JSON, and at the end `[DONE]` or an error, never both."""
    events = _text(body).split("\n\n")
    if events.pop() != "":
        raise BadAnswerError(f"a stream ends within an event: {body[-200:]!r}")
    if not events:
        raise BadAnswerError("an empty stream")
    for event in events:
        if not event.startswith("data: ") or "\n" in event:
            raise BadAnswerError(f"no event: {event[:200]!r}")
    *chunks, last = [event.removeprefix("data: ") for event in events]
    for chunk in chunks:
        value = _json(chunk.encode())
        if not isinstance(value, dict) or "choices" not in value:
            raise BadAnswerError(f"no chunk, and not at the end: {chunk[:300]!r}")
    if last != "[DONE]":
        check_error(_json(last.encode()))


def _json(body: bytes) -> Any:
    try:
        return json.loads(_text(body), parse_constant=_refuse_constant)
    except ValueError as error:
        raise BadAnswerError(f"no JSON ({error}): {body[:200]!r}") from None


def _refuse_constant(name: str) -> NoReturn:
    raise ValueError(f"{name} is not JSON")


def _text(body: bytes) -> str:
    try:
        return body.decode()
    except UnicodeDecodeError:
        raise BadAnswerError(f"no UTF-8: {body[:200]!r}") from None
