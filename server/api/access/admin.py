"""Admin routes. The auth middleware lets only the admin key in."""

from __future__ import annotations

import logging
from collections.abc import Awaitable, Callable, Sequence

import orjson
from aiohttp import web

from server.api.access import body
from server.api.access.control import ACCESS
from server.api.errors import SERVER_ERROR, ApiError, Handler
from server.api.split import weights_of
from server.api.state import STATE
from server.routing.assignment import Assignment
from server.routing.experiment import ACTIONS

logger = logging.getLogger(__name__)

Reload = Callable[[], Awaitable[Sequence[str]]]
"""Does what SIGHUP does, in every process; gives one line for each thing that stayed as it was because it is wrong."""


def admin_routes(reload: Reload) -> list[web.RouteDef]:
    """`GET /admin/keys`, `GET` and `POST /admin/weights`, `POST /admin/reload` and `/admin/experiment/{action}`."""
    return [
        web.get("/admin/keys", list_keys),
        web.post("/admin/reload", _reload_handler(reload)),
        web.post("/admin/experiment/{action}", experiment_action),
        web.get("/admin/weights", show_weights),
        web.post("/admin/weights", set_weights),
    ]


async def list_keys(request: web.Request) -> web.Response:
    """Every key's name, limits and use in the last 60 seconds, over all workers; never its hash."""
    access = request.app[ACCESS]
    keys = []
    for key in access.table.users() if access.table is not None else []:
        requests, tokens = access.limiter.ledger.used(key.row)
        keys.append(
            {
                "name": key.name,
                "requests_per_minute": key.requests_per_minute,
                "tokens_per_minute": key.tokens_per_minute,
                "best_priority": key.best_priority,
                "default_priority": key.default_priority,
                "speculation": key.speculation,
                "used": {"requests": requests, "tokens": tokens},
            }
        )
    return _json({"object": "list", "data": keys})


async def experiment_action(request: web.Request) -> web.Response:
    """`promote`, `roll_back`, `pause` or `resume`: written to the ledger as the administrator's. Raises ApiError."""
    action = request.match_info["action"]
    experiment = request.app[STATE].experiment
    if experiment is None:
        raise ApiError(404, "There is no experiment on this server.", code="not_found")
    if action not in ACTIONS:
        raise ApiError(404, f"There is no {action!r}; use one of {', '.join(ACTIONS)}.", code="not_found")
    problem = await experiment.asked(action, "admin")
    if problem is not None:
        raise ApiError(409, f"Nothing was changed: {problem}.", code="conflict")
    return _json({"status": "done"})


async def show_weights(request: web.Request) -> web.Response:
    """Percent of the traffic by arm."""
    return _json({"weights": dict(request.app[STATE].arms.weights)})


async def set_weights(request: web.Request) -> web.Response:
    """Other weights from now on, until the server ends or they are set again. Raises ApiError."""
    state = request.app[STATE]
    raw = await body.read_body(request, state.limits.max_body_bytes, state.config.body_timeout_s)
    weights = weights_of(state.config, state.arms.weights, raw)
    if state.share is None:
        state.arms.assign = Assignment(weights, state.config.routing.salt)
    else:
        await state.share(weights)
    logger.warning("weights set by %s: %s", request.remote, ", ".join(f"{n} {w:g} %" for n, w in weights.items()))
    return _json({"weights": weights})


def _reload_handler(reload: Reload) -> Handler:
    async def handler(request: web.Request) -> web.StreamResponse:
        """Key file and certificate are read again. Raises ApiError 500 with what is wrong; that stays as it was."""
        problems = await reload()
        if problems:
            message = "Not everything was reloaded; what was not stays as it was. " + " ".join(problems)
            raise ApiError(500, message, type=SERVER_ERROR, code="reload_failed")
        return _json({"status": "reloaded"})

    return handler


def _json(payload: object) -> web.Response:
    return web.Response(body=orjson.dumps(payload), content_type="application/json")
