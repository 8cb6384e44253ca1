"""Request ids: the client's own if it sends a plain one, else ours; on every answer, errors and streams included."""

from __future__ import annotations

import re
import secrets

from aiohttp import web

from server.api.errors import Handler

HEADER = "x-request-id"
REQUEST_ID: web.RequestKey[str] = web.RequestKey("request_id", str)

_PLAIN = re.compile(r"[A-Za-z0-9._:-]{1,128}")


def new_request_id() -> str:
    """128 random bits: no two processes need to agree on anything."""
    return "req-" + secrets.token_hex(16)


@web.middleware
async def request_id_middleware(request: web.Request, handler: Handler) -> web.StreamResponse:
    """Sets `request[REQUEST_ID]`. An id that is not 1 to 128 letters, digits and `._:-` is replaced."""
    given = request.headers.get(HEADER, "")
    request[REQUEST_ID] = given if _PLAIN.fullmatch(given) else new_request_id()
    return await handler(request)


async def add_request_id(request: web.Request, response: web.StreamResponse) -> None:
    """For `on_response_prepare`: also answers that are written piece by piece carry the id."""
    if REQUEST_ID in request:
        response.headers[HEADER] = request[REQUEST_ID]
