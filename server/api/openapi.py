"""`GET /openapi.json`: the OpenAPI 3.1 document. Requests come from the types that check them."""

from __future__ import annotations

from functools import lru_cache
from typing import Any

import msgspec
import orjson
from aiohttp import web

from server.api.openapi_answers import STRING, Schema, answer_schemas, ref
from server.api.options import SPECULATION_HEADER, TIMEOUT_HEADER
from server.api.schemas import EXACT, ChatRequest, CompletionRequest, DetokenizeRequest, TokenizeRequest
from server.api.state import STATE
from server.routing.experiment import ACTIONS

JSON = "application/json"
REQUESTS = (ChatRequest, CompletionRequest, TokenizeRequest, DetokenizeRequest)

ERRORS = {
    400: "The request is wrong; `param` names the field.",
    401: "No API key, or a wrong one (`invalid_api_key`).",
    403: "This key may not do that.",
    404: "There is no such model (`model_not_found`), action or experiment.",
    408: "The request, or its answer, took longer than it may.",
    409: "What was asked for makes no sense now; nothing was changed.",
    413: "The body is too large.",
    415: "The body is not announced as application/json.",
    429: "The queue is full or the key has used up its minute (`rate_limit_exceeded`).",
    431: "The request's headers are too large.",
    500: "The server failed.",
    503: "Not ready, restarting or shutting down.",
}
_EVERYWHERE = (400, 408, 431, 500)
_KEYED = (401, 403)
_BODY = (404, 413, 415, 429, 503)
_RETRY_AFTER = {"Retry-After": {"schema": {"type": "string"}, "description": "Seconds."}}
_HEADERS: dict[int, dict[str, Any]] = {
    401: {"WWW-Authenticate": {"schema": {"const": "Bearer"}}},
    429: _RETRY_AFTER,
    503: _RETRY_AFTER,
}
_LIMIT = {"schema": STRING, "description": "Where the key has a limit."}
_RATE_LIMITS = {
    f"x-ratelimit-{what}-{of}": _LIMIT for of in ("requests", "tokens") for what in ("limit", "remaining", "reset")
}
_REQUEST_ID = {"x-request-id": {"schema": STRING, "description": "The request's own, or one made up."}}


async def openapi(request: web.Request) -> web.Response:
    """The document, as bytes that were made once."""
    return web.Response(body=_encoded(request.app[STATE].version), content_type=JSON)


ROUTES = [web.get("/openapi.json", openapi)]


@lru_cache(maxsize=1)
def _encoded(version: str) -> bytes:
    return orjson.dumps(document(version))


def document(version: str) -> dict[str, Any]:
    """The whole document. Equal on every call."""
    return {
        "openapi": "3.1.0",
        "info": {
            "title": "Outpace",
            "version": version,
            "summary": "OpenAI's API with lossless speculative decoding.",
            "license": {"name": "Apache-2.0", "identifier": "Apache-2.0"},
        },
        "paths": {**_generation(), **_tokens(), **_models(), **_probes(), **_admin()},
        "components": {
            "schemas": {**_requests(), **answer_schemas()},
            "securitySchemes": {
                "key": {"type": "http", "scheme": "bearer", "description": "Where the server has a key file."},
                "admin": {"type": "http", "scheme": "bearer", "description": "The admin key of the key file."},
            },
        },
    }


def _requests() -> dict[str, Schema]:
    _, schemas = msgspec.json.schema_components(REQUESTS, ref_template="#/components/schemas/{name}")
    # The type lets it be left out so that what is missing is explained beside what else is wrong with a message.
    message = schemas["Message"]
    message["required"] = ["role", "content"]
    message["properties"]["content"].pop("default")
    return {name: _exact(schema) for name, schema in schemas.items()}


def _exact(value: Any) -> Any:
    """Puts the exact schemas where the types' own are."""
    if isinstance(value, list):
        return [_exact(item) for item in value]
    if not isinstance(value, dict):
        return value
    if EXACT in value:
        told = {name: value[name] for name in ("description", "default") if name in value}
        return {**value[EXACT], **told}
    return {name: _exact(item) for name, item in value.items()}


def _operation(
    name: str,
    summary: str,
    answers: dict[int, dict[str, Schema]],
    errors: tuple[int, ...],
    *,
    keyed: bool = True,
    admin: bool = False,
) -> dict[str, Any]:
    headers = {**_REQUEST_ID, **(_RATE_LIMITS if keyed and not admin else {})}
    responses: dict[str, Any] = {
        str(status): {
            "description": summary if status == 200 else ERRORS[status],
            "headers": {**headers, **_HEADERS.get(status, {})},
            "content": {kind: {"schema": schema} for kind, schema in content.items()},
        }
        for status, content in answers.items()
    }
    for status in sorted({*_EVERYWHERE, *(_KEYED if keyed else ()), *errors} - answers.keys()):
        responses[str(status)] = {
            "description": ERRORS[status],
            "headers": {**headers, **_HEADERS.get(status, {})},
            "content": {JSON: {"schema": ref("Error")}},
        }
    security: list[dict[str, Any]] = [{"admin": []}] if admin else [{"key": []}, {}] if keyed else []
    return {"operationId": name, "summary": summary, "security": security, "responses": responses}


def _post(path: str, schema: str, operation: dict[str, Any], parameters: list[dict[str, Any]]) -> dict[str, Any]:
    body = {"required": True, "content": {JSON: {"schema": ref(schema)}}}
    return {path: {"post": {**operation, "parameters": parameters, "requestBody": body}}}


def _header(name: str, description: str, pattern: str) -> dict[str, Any]:
    schema = {"type": "string", "pattern": pattern}
    return {"name": name, "in": "header", "required": False, "description": description, "schema": schema}


def _generation() -> dict[str, Any]:
    parameters = [
        _header(TIMEOUT_HEADER, "What `timeout` is; the body wins.", r"^([1-9][0-9]{0,7}|0\.[0-9]{0,8}[1-9])$"),
        _header(SPECULATION_HEADER, "`off`, `on` or the most draft tokens; the body wins.", r"^(on|off|[0-9]{1,9})$"),
    ]
    paths: dict[str, Any] = {}
    for path, request, answer, name, summary in (
        (
            "/v1/chat/completions",
            "ChatRequest",
            "ChatCompletion",
            "createChatCompletion",
            "An answer to a conversation",
        ),
        ("/v1/completions", "CompletionRequest", "Completion", "createCompletion", "Continuations of prompts"),
    ):
        operation = _operation(name, summary, {200: {JSON: ref(answer), "text/event-stream": _events(answer)}}, _BODY)
        paths |= _post(path, request, operation, parameters)
    return paths


def _events(answer: str) -> Schema:
    """What each event of a stream holds. `data` is JSON within a string, as server-sent events have it."""
    payload = {
        "type": "string",
        "contentMediaType": JSON,
        "contentSchema": {"anyOf": [ref(f"{answer}Chunk"), ref("Error")]},
    }
    return {
        "type": "object",
        "description": "With `stream`: each event. After success the last is `[DONE]`, after a failure an Error.",
        "properties": {"data": {"anyOf": [{"const": "[DONE]"}, payload]}},
        "required": ["data"],
    }


def _tokens() -> dict[str, Any]:
    to_tokens = _operation("tokenize", "The tokens of a text or a conversation", {200: {JSON: ref("Tokens")}}, _BODY)
    to_text = _operation("detokenize", "The text of tokens", {200: {JSON: ref("Text")}}, _BODY)
    return {
        **_post("/tokenize", "TokenizeRequest", to_tokens, []),
        **_post("/detokenize", "DetokenizeRequest", to_text, []),
    }


def _models() -> dict[str, Any]:
    model = {"name": "model", "in": "path", "required": True, "schema": {"type": "string", "minLength": 1}}
    stats = _operation("stats", "Latency quantiles, counters and gauges per arm", {200: {JSON: ref("Stats")}}, ())
    told = _operation("experiments", "The experiment between arms", {200: {JSON: ref("Experiments")}}, ())
    events = _operation("experimentEvents", "Its decisions, with evidence", {200: {JSON: ref("Experiments")}}, ())
    shadow = _operation("shadow", "Answers beside their copies", {200: {JSON: ref("Comparisons")}}, (), admin=True)
    return {
        "/v1/stats": {"get": stats},
        "/v1/shadow": {"get": {**shadow, "security": [{"admin": []}, {}]}},
        "/v1/experiments": {"get": told},
        "/v1/experiments/events": {"get": events},
        "/v1/models": {"get": _operation("listModels", "The served model", {200: {JSON: ref("Models")}}, ())},
        "/v1/models/{model}": {
            "get": {
                **_operation("getModel", "The served model by its id", {200: {JSON: ref("Model")}}, (404,)),
                "parameters": [model],
            }
        },
    }


def _probes() -> dict[str, Any]:
    ready = {200: {JSON: ref("Ready")}, 503: {JSON: ref("NotReady")}}
    paths: dict[str, Any] = {
        path: {"get": _operation(name, summary, answers, (), keyed=False)}
        for path, name, summary, answers in (
            ("/", "index", "What this is; for browsers the page", {200: {"text/plain": STRING, "text/html": STRING}}),
            ("/health", "health", "The API process lives", {200: {JSON: ref("Health")}}),
            ("/ready", "ready", "Requests are served", ready),
            ("/version", "version", "The version", {200: {JSON: ref("Version")}}),
            ("/metrics", "metrics", "Prometheus' text format 0.0.4", {200: {"text/plain": STRING}}),
            ("/openapi.json", "openapi", "This document", {200: {JSON: {"type": "object"}}}),
        )
    }
    file = _operation("pageFile", "A file of the page", {200: {"text/plain": STRING}}, (404,), keyed=False)
    parameter = {"name": "file", "in": "path", "required": True, "schema": STRING}
    paths["/page/{file}"] = {"get": {**file, "parameters": [parameter]}}
    info = _operation("serverInfo", "Settings and counters", {200: {JSON: ref("ServerInfo")}}, ())
    return {**paths, "/server_info": {"get": info}}


def _admin() -> dict[str, Any]:
    keys = _operation("listKeys", "API keys and their use", {200: {JSON: ref("Keys")}}, (), admin=True)
    reload = _operation("reload", "Key file and certificate read again", {200: {JSON: ref("Reloaded")}}, (), admin=True)
    what = "Promote the experiment's candidate or roll it back, pause or resume"
    acted = _operation("actOnExperiment", what, {200: {JSON: ref("Done")}}, (404, 409), admin=True)
    action = {"name": "action", "in": "path", "required": True, "schema": {"enum": list(ACTIONS)}}
    share = ref("Weights")
    shown = _operation("showWeights", "Each arm's share of the traffic", {200: {JSON: share}}, (), admin=True)
    set_to = _operation(
        "setWeights", "Other shares from now on", {200: {JSON: share}}, (400, 409, 413, 415), admin=True
    )
    asked = {"required": True, "content": {JSON: {"schema": share}}}
    return {
        "/admin/weights": {"get": shown, "post": {**set_to, "requestBody": asked}},
        "/admin/keys": {"get": keys},
        "/admin/reload": {"post": reload},
        "/admin/experiment/{action}": {"post": {**acted, "parameters": [action]}},
    }
