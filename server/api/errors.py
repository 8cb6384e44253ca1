"""Errors in OpenAI's shape: `{"error": {message, type, param, code}}`, for every status and route."""

from __future__ import annotations

import logging
from collections.abc import Awaitable, Callable, Mapping
from typing import Any

import orjson
from aiohttp import web

from server.engine.errors import EngineUnavailable

logger = logging.getLogger(__name__)

INVALID_REQUEST = "invalid_request_error"
SERVER_ERROR = "server_error"
RETRY_AFTER_S = 1
ERROR_CODE: web.ResponseKey[str] = web.ResponseKey("error_code", str)
"""What the access log says of an error answer: its `code`, its `type` where it has none."""

Handler = Callable[[web.Request], Awaitable[web.StreamResponse]]


class ApiError(Exception):
    """An answer other than success; `message` is for the client."""

    def __init__(
        self,
        status: int,
        message: str,
        *,
        type: str = INVALID_REQUEST,
        param: str | None = None,
        code: str | None = None,
        headers: Mapping[str, str] | None = None,
    ) -> None:
        super().__init__(message)
        self.status = status
        self.message = message
        self.type = type
        self.param = param
        self.code = code
        self.headers = dict(headers or {})

    def body(self) -> dict[str, Any]:
        """The four keys that OpenAI's clients read, always all four."""
        return {"error": {"message": self.message, "type": self.type, "param": self.param, "code": self.code}}

    def response(self) -> web.Response:
        """A header `Connection: close` is meant: aiohttp would send it and keep the connection."""
        response = web.Response(
            status=self.status,
            body=orjson.dumps(self.body()),
            content_type="application/json",
            headers=self.headers,
        )
        response[ERROR_CODE] = self.code or self.type
        if response.headers.get("Connection") == "close":
            response.force_close()
        return response


def invalid(message: str, param: str | None = None, code: str | None = None) -> ApiError:
    """The request is wrong: 400."""
    return ApiError(400, message, param=param, code=code)


def bad_header(name: str, value: str, valid: str) -> ApiError:
    """A header's value is wrong: 400."""
    return invalid(f"Invalid value for the header {name}: {value[:100]!r}; use {valid}.", name, "invalid_value")


def unsupported(message: str, param: str | None = None) -> ApiError:
    """OpenAI has it and this server does not yet: 400, so that it is never silently ignored."""
    return invalid(message, param, "unsupported_parameter")


def model_not_found(model: str) -> ApiError:
    """No such model here: 404."""
    return ApiError(404, f"The model {model!r} does not exist on this server.", param="model", code="model_not_found")


def queue_full(num_waiting: int, limit: int, retry_after_s: int = RETRY_AFTER_S) -> ApiError:
    """Too many requests wait already: 429, and when to come back."""
    return _overloaded(f"{num_waiting} requests wait and the limit is {limit}", retry_after_s)


def queue_full_of_tokens(num_tokens: int, wanted: int, limit: int) -> ApiError:
    """Too long prompts wait already: 429, and when to come back."""
    return _overloaded(f"prompts of {num_tokens} tokens are in flight, yours has {wanted} and the limit is {limit}")


def _overloaded(why: str, retry_after_s: int = RETRY_AFTER_S) -> ApiError:
    message = f"The server is overloaded: {why}. Please retry in {retry_after_s} s."
    headers = {"Retry-After": str(retry_after_s)}
    return ApiError(429, message, type="rate_limit_error", code="rate_limit_exceeded", headers=headers)


def request_timeout(timeout_s: float) -> ApiError:
    """The request's own deadline passed: 408."""
    message = f"The request was not complete within its timeout of {timeout_s:g} s; allow more, or ask for less."
    return ApiError(408, message, code="request_timeout")


def engine_unavailable(reason: str, code: str = "engine_unavailable") -> ApiError:
    """Nothing can be served now: 503, and when to come back."""
    headers = {"Retry-After": str(RETRY_AFTER_S)}
    return ApiError(503, reason, type=SERVER_ERROR, code=code, headers=headers)


def engine_failed(reason: str | None) -> ApiError:
    """The engine ended this one request with an error."""
    return ApiError(500, reason or "The engine failed to serve this request.", type=SERVER_ERROR, code="engine_error")


def as_api_error(error: BaseException) -> ApiError:
    """Any failure of a handler as what the client is told. What was not foreseen is logged, told without details."""
    if isinstance(error, ApiError):
        return error
    if isinstance(error, EngineUnavailable):
        return engine_unavailable(str(error) or "The engine is not available.")
    if isinstance(error, web.HTTPException):
        return _from_http_exception(error)
    logger.error("unhandled error", exc_info=error)
    return ApiError(500, "The server had an internal error; its log has the details.", type=SERVER_ERROR)


def _from_http_exception(error: web.HTTPException) -> ApiError:
    if isinstance(error, web.HTTPRequestEntityTooLarge):
        return ApiError(413, "The request body is larger than this server accepts.", code="request_too_large")
    if isinstance(error, web.HTTPMethodNotAllowed):
        allowed = ", ".join(sorted(error.allowed_methods))
        message = f"Method {error.method} is not allowed here; use {allowed}."
        return ApiError(405, message, code="method_not_allowed", headers={"Allow": allowed})
    if error.status == 404:
        return ApiError(404, "Unknown URL; the routes are listed at /.", code="unknown_url")
    kind = SERVER_ERROR if error.status >= 500 else INVALID_REQUEST
    return ApiError(error.status, error.text or error.reason, type=kind)


@web.middleware
async def error_middleware(request: web.Request, handler: Handler) -> web.StreamResponse:
    """Turns every exception into an OpenAI-shaped answer; what was already begun is the handler's own business."""
    try:
        return await handler(request)
    except ConnectionError:  # the client is gone: there is nobody to answer
        raise
    except Exception as error:  # noqa: BLE001 - the last resort: every failure becomes an answer, the unforeseen are logged
        return as_api_error(error).response()
