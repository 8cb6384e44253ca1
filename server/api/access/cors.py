"""Cross-origin requests (Fetch standard, CORS protocol): off unless origins are configured.

Keys come in a header, never in a cookie, so credentials are not allowed, and any origin (`*`) may be let in where keys
are needed.
"""

from __future__ import annotations

from collections.abc import Collection

from aiohttp import web
from aiohttp.typedefs import Middleware

from server.api.access.limits import HEADERS as RATE_LIMIT_HEADERS
from server.api.access.request_id import HEADER as REQUEST_ID_HEADER
from server.api.errors import Handler
from server.config import ConfigError

_METHODS = "GET, POST, OPTIONS"
_USUAL_HEADERS = "Authorization, Content-Type"
_EXPOSED = ", ".join((REQUEST_ID_HEADER, "retry-after", *RATE_LIMIT_HEADERS))
_PREFLIGHT_AGE_S = 600


def parse_origins(setting: str) -> frozenset[str]:
    """Origins separated by commas, such as `https://app.example`; `*` for any. Raises ConfigError."""
    origins = frozenset(origin.strip().lower() for origin in setting.split(",") if origin.strip())
    for origin in origins - {"*"}:
        scheme, mark, host = origin.partition("://")
        if not mark or not scheme or not host or any(character in host for character in "/?#* "):
            raise ConfigError(
                f"cors_origins: {origin!r} is not valid; use origins such as https://app.example, or * for any"
            )
    if not origins:
        raise ConfigError(f"cors_origins: {setting!r} names no origin; use origins such as https://app.example, or *")
    return origins


class Cors:
    """Append `add_headers` to the app's `on_response_prepare`, and put `middleware` outside authentication.

    The signal reaches answers that are written piece by piece and errors too; the middleware answers preflights, which
    carry no key. An origin that is not allowed is told nothing, and the browser then refuses the page.
    """

    def __init__(self, origins: Collection[str]) -> None:
        self._origins = frozenset(origins)
        self._any = "*" in origins

    async def add_headers(self, request: web.Request, response: web.StreamResponse) -> None:
        if not self._any:
            _add_vary(response, "Origin")
        if self._allows(request):
            response.headers["Access-Control-Allow-Origin"] = "*" if self._any else request.headers["Origin"]
            response.headers["Access-Control-Expose-Headers"] = _EXPOSED

    @property
    def middleware(self) -> Middleware:
        @web.middleware
        async def preflight_middleware(request: web.Request, handler: Handler) -> web.StreamResponse:
            if request.method == "OPTIONS" and "Access-Control-Request-Method" in request.headers:
                return self._preflight(request)
            return await handler(request)

        return preflight_middleware

    def _preflight(self, request: web.Request) -> web.Response:
        response = web.Response(status=204)
        _add_vary(response, "Access-Control-Request-Headers")
        if self._allows(request):
            # OpenAI's SDK in a browser sends a dozen x-stainless-… headers, and other clients their own.
            wanted = request.headers.get("Access-Control-Request-Headers", _USUAL_HEADERS)
            response.headers["Access-Control-Allow-Headers"] = wanted
            response.headers["Access-Control-Allow-Methods"] = _METHODS
            response.headers["Access-Control-Max-Age"] = str(_PREFLIGHT_AGE_S)
        return response

    def _allows(self, request: web.Request) -> bool:
        origin = request.headers.get("Origin")
        return origin is not None and (self._any or origin.lower() in self._origins)


def _add_vary(response: web.StreamResponse, name: str) -> None:
    present = response.headers.get("Vary")
    response.headers["Vary"] = name if present is None else f"{present}, {name}"
