"""The aiohttp application: routes, middlewares, shared state. It neither binds sockets nor starts the engine.

From the outside in: what a stop waits for, request id, access log, cross-origin answers, counting, errors,
authentication, handler.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial

from aiohttp import web

from server.api import chat, completions, openapi, page, routes, tokenize
from server.api.access.access_log import AccessLog
from server.api.access.admin import admin_routes
from server.api.access.auth import add_rate_limit_headers, auth_middleware
from server.api.access.control import ACCESS
from server.api.access.cors import Cors, parse_origins
from server.api.access.request_id import add_request_id, request_id_middleware
from server.api.access.route import route_of
from server.api.arms import ARMS, add_arm
from server.api.errors import Handler, error_middleware
from server.api.page import PAGE_ROUTE
from server.api.state import STATE, ServerState
from server.api.traces import Traces, add_traceparent


@web.middleware
async def _account(request: web.Request, handler: Handler) -> web.StreamResponse:
    """Counts answers by route and status.

    A server that is leaving closes the connection with its answer.
    """
    response = await handler(request)
    state = request.app[STATE]
    state.metrics.count_answer(route_of(request), response.status)
    if state.draining and not response.prepared:
        response.force_close()
    return response


@web.middleware
async def _in_progress(request: web.Request, handler: Handler) -> web.StreamResponse:
    """What a stop waits for: requests of work, from their first to their last byte."""
    if request.method != "POST":
        return await handler(request)
    state = request.app[STATE]
    state.begin()
    try:
        return await handler(request)
    finally:
        state.end()


def create_app(state: ServerState, access_log: AccessLog | None = None) -> web.Application:
    """An arm's `text` may still be None: until it is set and its engine is ready, generation answers 503."""
    log = access_log or AccessLog(None)
    middlewares = [_in_progress, request_id_middleware, log.middleware]
    signals = [add_request_id, add_rate_limit_headers, add_arm]
    if state.config.cors_origins is not None:
        cors = Cors(parse_origins(state.config.cors_origins))
        middlewares.append(cors.middleware)
        signals.append(cors.add_headers)
    if state.tracing is not None:
        middlewares.append(Traces(state.tracing).middleware)
        signals.append(add_traceparent)
    middlewares += [_account, error_middleware, auth_middleware]
    app = web.Application(middlewares=middlewares, client_max_size=state.limits.max_body_bytes)
    app[STATE] = state
    app[ACCESS] = state.access
    app.on_response_prepare.extend(signals)
    app[ARMS] = state.arms
    for arm in state.arms.every:
        arm.engine.on_stats = partial(state.metrics.on_stats, arm.name)
        state.metrics.watch_engine(arm.name, arm.engine)
        state.metrics.of(arm.name)  # shown before its first request

    async def reload() -> Sequence[str]:
        return [] if state.reload is None else await state.reload()

    app.add_routes(
        [
            web.get("/", routes.index),
            web.get(PAGE_ROUTE, page.file),
            web.get("/health", routes.health),
            web.get("/ready", routes.ready),
            web.get("/version", routes.version),
            web.get("/server_info", routes.server_info),
            web.get("/metrics", routes.scrape),
            web.get("/v1/stats", routes.stats),
            web.get("/v1/experiments", routes.experiments),
            web.get("/v1/experiments/events", routes.experiment_events),
            web.get("/v1/shadow", routes.shadow),
            web.get("/v1/models", routes.list_models),
            # A model's id may be a hub id or a path with slashes.
            web.get("/v1/models/{model:.+}", routes.get_model),
            web.post("/v1/chat/completions", chat.chat_completions),
            web.post("/v1/completions", completions.completions),
            *tokenize.ROUTES,
            *openapi.ROUTES,
            *admin_routes(reload),
        ]
    )
    return app
