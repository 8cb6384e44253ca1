from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any

import jsonschema  # type: ignore[import-untyped]
import msgspec
import pytest
from msgspec.structs import replace

from server.api.app import create_app
from server.api.openapi import document
from server.api.params import Limits
from server.api.parsing import parse_body
from server.api.schemas import MAX_CHOICES, ChatRequest, CompletionRequest
from server.core import TokenLogprobs
from server.engine.messages import EngineStats
from tests.api.conftest import Live, Serve
from tests.api.fakes import FakeEngine, steps

DOCUMENT = document("1.2.3")
CHAT, COMPLETION = "/v1/chat/completions", "/v1/completions"
ERROR = {"$ref": "#/components/schemas/Error"}


def check(value: Any, schema: dict[str, Any]) -> None:
    jsonschema.validate(value, {**schema, "components": DOCUMENT["components"]}, jsonschema.Draft202012Validator)


def answer_schema(method: str, path: str, status: int, kind: str = "application/json") -> dict[str, Any]:
    schema: dict[str, Any] = DOCUMENT["paths"][path][method]["responses"][str(status)]["content"][kind]["schema"]
    return schema


def _refs(value: Any) -> Iterator[str]:
    if isinstance(value, dict):
        if "$ref" in value:
            yield value["$ref"]
        for item in value.values():
            yield from _refs(item)
    elif isinstance(value, list):
        for item in value:
            yield from _refs(item)


def test_it_is_the_same_every_time_and_whole() -> None:
    assert json.dumps(document("1.2.3")) == json.dumps(DOCUMENT)
    names = {f"#/components/schemas/{name}" for name in DOCUMENT["components"]["schemas"]}
    assert set(_refs(DOCUMENT)) == names | {ERROR["$ref"]}, "no reference leads nowhere, no schema is there for nothing"
    for schema in DOCUMENT["components"]["schemas"].values():
        jsonschema.Draft202012Validator.check_schema(schema)
    assert "x-exact" not in json.dumps(DOCUMENT)


async def test_it_is_served(live: Live) -> None:
    assert await live.get("/openapi.json") == (200, DOCUMENT)


async def test_routes_and_document_are_the_same(live: Live) -> None:
    index = (await live.get("/"))[1]
    app = create_app(live.state)
    routes = {
        (route.method.lower(), route.resource.canonical)
        for route in app.router.routes()
        if route.resource is not None and route.method != "HEAD"
    }
    documented = {(method, path) for path, methods in DOCUMENT["paths"].items() for method in methods}
    assert routes == documented
    assert all(path in index for _, path in routes if not path.startswith(("/admin", "/page", "/v1/models/")))
    operations = [operation["operationId"] for methods in DOCUMENT["paths"].values() for operation in methods.values()]
    assert len(set(operations)) == len(operations)


@pytest.mark.parametrize(
    "path", ["/", "/health", "/ready", "/version", "/server_info", "/metrics", "/v1/models", "/v1/stats"]
)
async def test_plain_answers_are_as_documented(live: Live, path: str) -> None:
    live.engine.stats = EngineStats(drafted_per_position=[4, 2], accepted_per_position=[3, 1])
    async with live.http.get(live.url + path) as response:
        content = DOCUMENT["paths"][path]["get"]["responses"]["200"]["content"]
        assert response.content_type in content
        if response.content_type == "application/json":
            check(await response.json(), content["application/json"]["schema"])
        assert "x-request-id" in response.headers


async def test_ready_before_it_is(serve: Serve) -> None:
    live = await serve(ready=False)
    check((await live.get("/ready"))[1], answer_schema("get", "/ready", 503))
    check((await live.get("/server_info"))[1], answer_schema("get", "/server_info", 200))
    check((await live.get("/v1/models"))[1], answer_schema("get", "/v1/models", 200))


FORMS: list[dict[str, Any]] = [
    {},
    {"n": 2},
    {"return_token_ids": True, "skip_special_tokens": False},
    {"speculative": {"metrics": "detailed", "annotate": True}},
    {"speculative": {"metrics": "summary"}, "n": 2},
    {"max_tokens": 3},
]
CHAT_FORMS = [*FORMS, {"logprobs": True, "top_logprobs": 2}, {"prediction": {"type": "content", "content": "Hello"}}]
COMPLETION_FORMS = [
    *FORMS,
    {"logprobs": 2},
    {"echo": True},
    {"echo": True, "logprobs": 1, "max_tokens": 0},
    {"prompt": ["a", "b"], "n": 2},
]


def _scored(request: Any) -> Any:
    """As the engine, which gives the prompt's log-probabilities with its first output."""
    outputs = steps("Hello", " world")(request)
    if request.prompt_logprobs is None:
        return outputs
    scored = [TokenLogprobs(token, -1.0, [token], [-1.0]) for token in request.prompt_ids[1:]]
    return [replace(outputs[0], prompt_logprobs=scored), *outputs[1:]]


@pytest.mark.parametrize(
    ("path", "fields"),
    [*((CHAT, form) for form in CHAT_FORMS), *((COMPLETION, form) for form in COMPLETION_FORMS)],
)
async def test_generated_answers_are_as_documented(serve: Serve, path: str, fields: dict[str, Any]) -> None:
    live = await serve(FakeEngine(_scored))
    start: dict[str, Any] = {"messages": [{"role": "user", "content": "Hi"}]} if path == CHAT else {"prompt": "Hi"}
    body = {**start, **fields}
    status, answer = await live.post(path, body)
    assert status == 200, answer
    check(answer, answer_schema("post", path, 200))
    streamed = {**body, "stream": True, "stream_options": {"include_usage": len(fields) % 2 == 0}}
    async with live.http.post(live.url + path, json=streamed) as response:
        assert response.content_type == "text/event-stream"
        events = (await response.text()).split("\n\n")
    done, payload = answer_schema("post", path, 200, "text/event-stream")["properties"]["data"]["anyOf"]
    assert done == {"const": "[DONE]"}
    assert events[-2:] == ["data: [DONE]", ""]
    for event in events[:-2]:
        check(json.loads(event.removeprefix("data: ")), payload["contentSchema"])


@pytest.mark.parametrize(
    ("path", "body"),
    [
        (CHAT, {"messages": []}),
        (CHAT, {"messages": [{"role": "user", "content": "Hi"}], "model": "x"}),
        (COMPLETION, {"prompt": "Hi", "timeout": 1e-9}),
        ("/tokenize", {}),
        ("/detokenize", {"tokens": [1], "model": "x"}),
    ],
)
async def test_errors_are_as_documented(live: Live, path: str, body: Any) -> None:
    status, answer = await live.post(path, body)
    assert status >= 400
    check(answer, answer_schema("post", path, status))


async def test_tokens_are_as_documented(live: Live) -> None:
    body = {"prompt": "a", "return_token_strs": True}
    check((await live.post("/tokenize", body))[1], answer_schema("post", "/tokenize", 200))
    check((await live.post("/detokenize", {"tokens": [65]}))[1], answer_schema("post", "/detokenize", 200))


BODIES: list[tuple[Any, dict[str, Any]]] = [
    (ChatRequest, {"messages": [{"role": "user", "content": "Hi"}]}),
    (CompletionRequest, {"prompt": "Hi"}),
]


@pytest.mark.parametrize(("schema", "body"), BODIES)
def test_request_schemas_say_what_the_types_check(schema: Any, body: dict[str, Any]) -> None:
    documented = DOCUMENT["components"]["schemas"][schema.__name__]
    reference = {"$ref": f"#/components/schemas/{schema.__name__}"}
    assert set(documented["properties"]) == set(schema.__struct_fields__)
    check(body, reference)
    wrong: list[dict[str, Any]] = [
        {"x": 1},
        {"temperature": 3},
        {"n": MAX_CHOICES + 1},
        {"seed": True},
        {"logit_bias": {"1": 101}},
    ]
    for fields in [*wrong, {"top_p": -0.1}, {"stream": 1}, {"timeout": 0}, {"speculative": {"metrics": "x"}}]:
        with pytest.raises(jsonschema.ValidationError):
            check({**body, **fields}, reference)
        with pytest.raises(Exception, match=next(iter(fields))):
            parse_body(msgspec.json.encode({**body, **fields}), schema)
    later: list[dict[str, Any]] = [{"stop": "x" * 257}, {"stop": [""]}, {"logit_bias": {"01": 1}}]
    for fields in later:
        with pytest.raises(jsonschema.ValidationError):
            check({**body, **fields}, reference)


def test_the_documented_number_of_choices_is_the_limit() -> None:
    assert Limits().max_n == MAX_CHOICES
