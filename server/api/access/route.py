"""Routes by their pattern, for what counts, logs or allows by route. Never by path: a client can make up any number."""

from __future__ import annotations

from aiohttp import web

UNKNOWN = "unknown"


def route_of(request: web.Request) -> str:
    """The pattern of the route that serves the request; UNKNOWN where there is none."""
    resource = request.match_info.route.resource
    return UNKNOWN if resource is None else resource.canonical
