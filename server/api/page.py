"""The page that browsers get on `/`, and its files. Nothing of it comes from elsewhere."""

from __future__ import annotations

from functools import cache
from pathlib import Path

from aiohttp import web

from server import dashboard

STATIC = Path(dashboard.__file__).parent / "static"
PAGE_ROUTE = "/page/{file:.+}"
_TYPES = {".js": "text/javascript", ".css": "text/css", ".svg": "image/svg+xml", ".html": "text/html"}
# Scripts, styles and requests are this server's own. uPlot sets sizes as styles of elements.
_POLICY = "; ".join(
    (
        "default-src 'self'",
        "style-src 'self' 'unsafe-inline'",
        "base-uri 'none'",
        "form-action 'none'",
        "frame-ancestors 'none'",
    )
)


def wants_page(request: web.Request) -> bool:
    """Whether a browser asks: other clients are told of the routes in plain text."""
    return "text/html" in request.headers.get("Accept", "")


def page() -> web.Response:
    """The page."""
    return _answer("index.html")


async def file(request: web.Request) -> web.Response:
    """A file of the page."""
    name = request.match_info["file"]
    if name not in _files():
        raise web.HTTPNotFound
    return _answer(name)


def _answer(name: str) -> web.Response:
    headers = {
        "Cache-Control": "no-cache",
        "Content-Security-Policy": _POLICY,
        "X-Content-Type-Options": "nosniff",
        "Referrer-Policy": "no-referrer",
    }
    kind = _TYPES.get(Path(name).suffix, "text/plain")
    return web.Response(body=_files()[name], content_type=kind, charset="utf-8", headers=headers)


@cache
def _files() -> dict[str, bytes]:
    """All of them, by path: only what is there can be asked for."""
    return {str(path.relative_to(STATIC)): path.read_bytes() for path in STATIC.rglob("*") if path.is_file()}
