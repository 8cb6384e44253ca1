"""Reads a request's body within bounds of size and time."""

from __future__ import annotations

import asyncio

from aiohttp import web
from aiohttp.http_exceptions import HttpProcessingError

from server.api.errors import ApiError

_CLOSE = {"Connection": "close"}


async def read_body(request: web.Request, limit: int, timeout_s: float) -> bytes:
    """The whole body, decompressed if it came compressed: `limit` bounds what it becomes.

    Raises ApiError 415 where it is not announced as JSON, 413 as soon as it is known to be longer than `limit` bytes,
    408 where it is not complete after `timeout_s` seconds however many bytes still trickle in, 400 where its encoding
    is broken. What is not read is not waited for: the connection closes.
    """
    if request.content_type != "application/json":
        shown = request.headers.get("Content-Type", "")[:100]
        message = f"Content-Type {shown!r} is not supported; use application/json."
        raise ApiError(415, message, code="unsupported_media_type")
    announced = request.content_length
    if announced is not None and announced > limit:
        raise _too_large(limit)
    if request.content.is_eof() and not request.content.total_bytes:
        return b""
    try:
        if request.content.is_eof() and request.content.total_bytes <= limit:  # it came with the head
            return request.content.read_nowait()
        async with asyncio.timeout(timeout_s):
            return await _collect(request, limit)
    except TimeoutError:
        message = f"The request's body did not arrive within {timeout_s:g} s; send it faster or send less."
        raise ApiError(408, message, code="request_timeout", headers=_CLOSE) from None
    except (web.RequestPayloadError, HttpProcessingError) as error:
        error_line = str(getattr(error, "message", "") or error).split("\n", 1)[0][:200]
        message = f"The request's body is broken: {error_line}."
        raise ApiError(400, message, code="invalid_body", headers=_CLOSE) from error


async def _collect(request: web.Request, limit: int) -> bytes:
    chunks: list[bytes] = []
    num_bytes = 0
    while chunk := await request.content.readany():
        num_bytes += len(chunk)
        if num_bytes > limit:
            raise _too_large(limit)
        chunks.append(chunk)
    return chunks[0] if len(chunks) == 1 else b"".join(chunks)


def _too_large(limit: int) -> ApiError:
    message = f"The request's body is larger than the {limit} bytes that this server accepts; send less."
    return ApiError(413, message, code="request_too_large", headers=_CLOSE)
