"""What is told to clients whose request is no HTTP, or none that this server speaks."""

from __future__ import annotations

import orjson
from aiohttp import HttpVersion10, HttpVersion11
from aiohttp.http_exceptions import BadHttpMethod, LineTooLong
from aiohttp.http_parser import RawRequestMessage

from server.api.access.request_id import HEADER as REQUEST_ID_HEADER
from server.api.errors import SERVER_ERROR, ApiError

_CLOSE = {"Connection": "close"}


def fault_of(message: RawRequestMessage) -> ApiError | None:
    """What is wrong with a head that was parsed; None for nothing. aiohttp fails on these outside any middleware."""
    if message.version not in (HttpVersion10, HttpVersion11):
        version = f"{message.version.major}.{message.version.minor}"
        return ApiError(400, f"HTTP/{version} is not spoken here; use HTTP/1.1.", code="invalid_http", headers=_CLOSE)
    expectation = message.headers.get("Expect", "")
    if expectation and expectation.lower() != "100-continue":
        text = "The header Expect has a value that is not known; use 100-continue, or leave it out."
        return ApiError(417, text, code="invalid_http", headers=_CLOSE)
    return None


def unusable_head() -> ApiError:
    """A head that the parser let through and that is no request all the same."""
    return ApiError(400, "The request's head is not valid HTTP.", code="invalid_http", headers=_CLOSE)


def explain(status: int, exc: BaseException | None, message: str | None) -> ApiError:
    """What aiohttp could not parse, or failed to answer, as an error for the client."""
    if status >= 500:
        text = "The server had an internal error; its log has the details."
        return ApiError(status, text, type=SERVER_ERROR, headers=_CLOSE)
    if isinstance(exc, LineTooLong):
        limit = exc.args[1]
        text = f"The request line or a header is longer than the {limit} bytes that this server accepts; send less."
        return ApiError(431, text, code="request_headers_too_large", headers=_CLOSE)
    if message is not None and message.startswith("Too many headers"):
        return ApiError(431, "The request has too many headers.", code="request_headers_too_large", headers=_CLOSE)
    if isinstance(exc, BadHttpMethod) and "HTTPS traffic" in (message or ""):
        return ApiError(400, "This port speaks HTTP; use http:// in the URL.", code="invalid_http", headers=_CLOSE)
    # The parser's message shows the bytes in question over several lines; its first line says what is wrong.
    reason = (message or "Bad request").split("\n", 1)[0].rstrip(": ")[:200]
    return ApiError(400, f"The request is not valid HTTP: {reason}.", code="invalid_http", headers=_CLOSE)


def raw_timeout(timeout_s: float, request_id: str) -> bytes:
    """A whole answer, for a connection that has no request to answer."""
    text = f"The request's head did not arrive within {timeout_s:g} s; send it faster."
    body = orjson.dumps(ApiError(408, text, code="request_timeout").body())
    head = (
        "HTTP/1.1 408 Request Timeout\r\nContent-Type: application/json\r\n"
        f"Content-Length: {len(body)}\r\nConnection: close\r\n{REQUEST_ID_HEADER}: {request_id}\r\n\r\n"
    )
    return head.encode() + body
