"""Everything but generation: models, probes, versions, metrics."""

from __future__ import annotations

import asyncio
import math
import os
from dataclasses import asdict
from pathlib import Path
from typing import Any

import orjson
from aiohttp import web

from server.api.arm import Arm
from server.api.errors import RETRY_AFTER_S, model_not_found
from server.api.page import page, wants_page
from server.api.state import STATE, ServerState
from server.engine.messages import EngineStats
from server.telemetry import metrics

INDEX = """Outpace {version}: an OpenAI-compatible server with lossless speculative decoding.
Open this address in a browser for a page with charts and a playground.

POST /v1/chat/completions  /v1/completions  /tokenize  /detokenize
GET  /v1/models  /v1/models/{{id}}
GET  /health  /ready  /version  /server_info  /metrics  /v1/stats  /openapi.json
GET  /v1/experiments  /v1/experiments/events  /v1/shadow
"""


def json_response(payload: Any, status: int = 200, headers: dict[str, str] | None = None) -> web.Response:
    """`payload` as a JSON answer."""
    body = orjson.dumps(payload, option=orjson.OPT_NON_STR_KEYS)
    return web.Response(status=status, body=body, content_type="application/json", headers=headers)


async def index(request: web.Request) -> web.Response:
    """The page for browsers; for others what this is and where its routes are."""
    if wants_page(request):
        return page()
    return web.Response(text=INDEX.format(version=request.app[STATE].version))


async def health(request: web.Request) -> web.Response:
    """The API process is alive; whether it serves is `/ready`'s business."""
    return json_response({"status": "ok"})


async def ready(request: web.Request) -> web.Response:
    """200 while the server serves, else 503 with the reason."""
    reason = request.app[STATE].not_ready
    if reason is None:
        return json_response({"status": "ready"})
    status, why = reason
    return json_response({"status": status, "reason": why}, 503, {"Retry-After": str(RETRY_AFTER_S)})


async def version(request: web.Request) -> web.Response:
    """The version of Outpace."""
    return json_response({"version": request.app[STATE].version})


async def server_info(request: web.Request) -> web.Response:
    """Settings, what the engine says of itself (null until it is ready) and its counters."""
    state = request.app[STATE]
    return json_response(
        {
            "version": state.version,
            "model": state.control.model_name,
            "ready": state.not_ready is None,
            "config": asdict(state.config),
            **_engine_info(state.control),
            "arms": {
                arm.name: {"model": arm.config.model, **_arm_readiness(arm), **_engine_info(arm)}
                for arm in state.arms.every[1:]
            },
            "process": process_info(),
            "internal_states": [{"avg_spec_accept_length": accept_length(state.control.engine.stats)}],
        }
    )


def _engine_info(arm: Arm) -> dict[str, Any]:
    """What an arm's engine says of itself."""
    engine, info = arm.engine, arm.engine.info
    return {
        "engine": None if info is None else asdict(info),
        "stats": asdict(engine.stats),
        "speculation": speculation_state(engine.stats),
        "num_engine_restarts": engine.num_restarts,
    }


def _arm_readiness(arm: Arm) -> dict[str, Any]:
    reason = arm.not_ready
    return {"ready": reason is None, "reason": None if reason is None else f"{reason[0]}: {reason[1]}"}


def speculation_state(stats: EngineStats) -> dict[str, Any]:
    """Whether drafting is paused, since when (Unix seconds) and why, and what it promises and brings (1: nothing)."""
    since = stats.speculation_paused_since
    return {
        "paused": stats.speculation_paused,
        "since": None if since is None else int(since),
        "reason": stats.speculation_pause_reason,
        "predicted_speedup": stats.predicted_speedup,
        "realised_speedup": stats.realised_speedup,
    }


def process_info() -> dict[str, int]:
    """What this API process holds: it must not grow while nothing is asked of it."""
    descriptors = Path("/proc/self/fd")
    num_fds = sum(1 for _ in descriptors.iterdir()) if descriptors.is_dir() else -1
    return {"pid": os.getpid(), "num_tasks": len(asyncio.all_tasks()), "num_fds": num_fds}


def accept_length(stats: EngineStats) -> float | None:
    """Tokens that a sequence gained by a verify step with drafts, the bonus token included; None before the first.

    Where SGLang's benchmarks look for it (`internal_states[0].avg_spec_accept_length`).
    """
    num_verified = sum(stats.drafted_per_position[:1])  # a step of a sequence that drafted at all has a first draft
    return 1 + sum(stats.accepted_per_position) / num_verified if num_verified else None


async def scrape(request: web.Request) -> web.Response:
    """Prometheus' text format."""
    state = request.app[STATE]
    body = state.metrics.render() if state.scrape is None else await state.scrape()
    return web.Response(body=body, headers={"Content-Type": metrics.CONTENT_TYPE})


async def stats(request: web.Request) -> web.Response:
    """P50, P95 and P99 per arm and window, counters and gauges; of the whole server."""
    state = request.app[STATE]
    body = state.metrics.stats() if state.stats is None else await state.stats()
    return web.Response(body=body, content_type="application/json")


async def experiments(request: web.Request) -> web.Response:
    """The experiment, where there is one: stage, weights, what every metric says by now."""
    experiment = request.app[STATE].experiment
    data = [] if experiment is None else await experiment.told()
    return json_response({"object": "list", "data": finite(data)})


async def experiment_events(request: web.Request) -> web.Response:
    """Every decision with its evidence, oldest first."""
    experiment = request.app[STATE].experiment
    data = [] if experiment is None else await experiment.decisions()
    return json_response({"object": "list", "data": data})


async def shadow(request: web.Request) -> web.Response:
    """What comparisons of answers with their copies showed: counts by pair of arms, the last divergences."""
    told = request.app[STATE].comparisons
    found = {"object": "list", "pairs": [], "data": []} if told is None else await told()
    return json_response(finite(found))


def finite(value: Any) -> Any:
    """`value` with null for numbers that JSON has not."""
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, dict):
        return {key: finite(part) for key, part in value.items()}
    return [finite(part) for part in value] if isinstance(value, list | tuple) else value


async def list_models(request: web.Request) -> web.Response:
    """The model that this server serves, and its arms where there are several."""
    state = request.app[STATE]
    return json_response({"object": "list", "data": [_model(state, name, arm) for name, arm in _models(state).items()]})


async def get_model(request: web.Request) -> web.Response:
    """That model by its id, 404 for any other."""
    state = request.app[STATE]
    name = request.match_info["model"]
    arm = _models(state).get(name)
    if arm is None:
        raise model_not_found(name)
    return json_response(_model(state, name, arm))


def _models(state: ServerState) -> dict[str, Arm]:
    """What `model` in a request may be: the public name, which arms share, and arms by their own."""
    arms = {arm.name: arm for arm in state.arms.every} if len(state.arms.every) > 1 else {}
    return {state.control.model_name: state.control, **arms}


def _model(state: ServerState, name: str, arm: Arm) -> dict[str, Any]:
    info = arm.engine.info
    return {
        "id": name,
        "object": "model",
        "created": state.created,
        "owned_by": "outpace",
        "root": arm.config.model,
        "parent": None,
        "max_model_len": None if info is None else info.max_model_len,
    }
