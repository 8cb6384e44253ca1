"""The aiohttp application: routes, middlewares, shared state. It neither binds sockets nor starts the engine."""

from __future__ import annotations

from aiohttp import web

from server.api import chat, completions, routes
from server.api.errors import Handler, error_middleware
from server.api.state import STATE, ServerState


@web.middleware
async def _count_requests(request: web.Request, handler: Handler) -> web.StreamResponse:
    """Counts answers by route pattern (not by path: a client could make up any number of those) and status."""
    response = await handler(request)
    resource = request.match_info.route.resource
    route = "unknown" if resource is None else resource.canonical
    request.app[STATE].metrics.http_requests.labels(route, str(response.status)).inc()
    return response


@web.middleware
async def _close_when_draining(request: web.Request, handler: Handler) -> web.StreamResponse:
    response = await handler(request)
    if request.app[STATE].draining and not response.prepared:
        response.force_close()
    return response


def create_app(state: ServerState) -> web.Application:
    """`state.text` may still be None: until it is set and the engine is ready, generation answers 503."""
    middlewares = [_count_requests, _close_when_draining, error_middleware]
    app = web.Application(middlewares=middlewares, client_max_size=state.limits.max_body_bytes)
    app[STATE] = state
    state.engine.on_frame = state.metrics.on_frame
    state.metrics.watch_engine(lambda: state.engine.ready, lambda: state.engine.num_restarts)
    app.add_routes(
        [
            web.get("/", routes.index),
            web.get("/health", routes.health),
            web.get("/ready", routes.ready),
            web.get("/version", routes.version),
            web.get("/server_info", routes.server_info),
            web.get("/metrics", routes.scrape),
            web.get("/v1/models", routes.list_models),
            # A model's id may be a hub id or a path with slashes.
            web.get("/v1/models/{model:.+}", routes.get_model),
            web.post("/v1/chat/completions", chat.chat_completions),
            web.post("/v1/completions", completions.completions),
        ]
    )
    return app


def create_runner(app: web.Application) -> web.AppRunner:
    """A vanished client cancels its handler at once, and with it its requests in the engine."""
    return web.AppRunner(app, handler_cancellation=True, access_log=None, shutdown_timeout=1.0)
