"""What a chat request may ask for beyond its sampling."""

from __future__ import annotations

from typing import Any

import orjson
import pytest

from server.api import chat
from server.api.access.auth import Caller
from server.api.access.keys import ApiKey
from tests.api.conftest import Live, Serve
from tests.api.fakes import BOS, FakeEngine, endless

USER: list[Any] = [{"role": "user", "content": "Hi"}]


async def _chat_with(live: Live, headers: dict[str, str], **fields: Any) -> tuple[int, Any]:
    return await live.post("/v1/chat/completions", {"messages": USER, **fields}, headers=headers)


async def test_headers_say_what_the_body_does_not(live: Live) -> None:
    assert (await _chat_with(live, {"X-Speculation": "off"}))[0] == 200
    assert (await _chat_with(live, {"x-speculation": "2"}, speculative={"enabled": True}))[0] == 200
    first, second = (request.speculation for request in live.engine.requests)
    assert (first.enabled, second.enabled, second.max_draft_tokens) == (False, True, 2)
    status, answer = await _chat_with(live, {"X-Speculation": "maybe"})
    assert (status, answer["error"]["param"]) == (400, "X-Speculation")


@pytest.mark.parametrize("in_header", [False, True])
async def test_a_timeout_ends_the_request(serve: Serve, in_header: bool) -> None:
    live = await serve(FakeEngine(endless, step_s=0.005))
    headers = {"X-Request-Timeout": "0.05"} if in_header else {}
    status, answer = await _chat_with(live, headers, **({} if in_header else {"timeout": 0.05}))
    assert (status, answer["error"]["code"]) == (408, "request_timeout")
    await live.engine.until(lambda: not live.engine.active)


@pytest.mark.parametrize(
    ("content", "expected"),
    [("Hello", b"Hello"), ([{"type": "text", "text": "Hel"}, {"type": "text", "text": "lo"}], b"Hel\nlo"), ("", b"")],
)
async def test_a_prediction_is_handed_to_the_engine_as_tokens(live: Live, content: Any, expected: bytes) -> None:
    fields: Any = {"prediction": {"type": "content", "content": content}}
    answer = await live.client.chat.completions.create(model="fake", messages=USER, n=2, logprobs=True, **fields)
    assert answer.choices[1].message.content == "Hello world"
    assert [bytes(request.prediction_ids) for request in live.engine.requests] == [expected] * 2


async def test_a_prediction_is_cut_at_the_context(live: Live) -> None:
    for length in (300, 100_000):
        assert (await live.chat(prediction={"type": "content", "content": "x" * length}))[0] == 200
    assert [len(request.prediction_ids) for request in live.engine.requests] == [256, 256]


async def test_a_prediction_that_is_no_text_is_named(live: Live) -> None:
    content = [{"type": "image_url", "image_url": {}}]
    _, answer = await live.chat(prediction={"type": "content", "content": content})
    assert answer["error"]["param"] == "prediction.content[0].type"


async def test_a_messages_name_reaches_the_template(live: Live, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[Any] = []

    def encode_chat(messages: Any, **options: Any) -> list[int]:
        seen.append((messages, options))
        return [1]

    monkeypatch.setattr(live.state.control.text, "encode_chat", encode_chat)
    await live.chat(messages=[{"role": "user", "content": "Hi", "name": "Ada"}])
    assert seen == [
        ([{"role": "user", "content": "Hi", "name": "Ada"}], {"add_generation_prompt": True, "max_tokens": 256})
    ]


@pytest.mark.parametrize(
    "part",
    [{"type": "text", "text": "a", "prompt_cache_breakpoint": {"mode": "explicit"}}, {"type": "text", "text": ""}],
)
async def test_parts_that_are_fine(live: Live, part: Any) -> None:
    assert (await live.chat(messages=[{"role": "user", "content": [part]}]))[0] == 200


async def test_token_ids_whole_and_streamed(live: Live) -> None:
    _, answer = await live.chat(return_token_ids=True)
    ids = [*b"Hello world", 256]
    assert answer["prompt_token_ids"] == [BOS, *b"user:Hi\n"]
    assert answer["choices"][0]["token_ids"] == ids
    body = {"messages": USER, "return_token_ids": True, "stream": True}
    async with live.http.post(live.url + "/v1/chat/completions", json=body) as response:
        lines = (await response.text()).split("\n\n")[:-2]
    chunks = [orjson.loads(line.removeprefix("data: ")) for line in lines]
    assert chunks[0]["prompt_token_ids"] == answer["prompt_token_ids"]
    assert [i for chunk in chunks for i in chunk["choices"][0].get("token_ids", [])] == ids


async def test_annotations_cover_the_text(live: Live) -> None:
    _, answer = await live.chat(speculative={"annotate": True})
    pieces = answer["choices"][0]["draft_annotations"]
    assert "".join(piece["text"] for piece in pieces) == "Hello world"
    assert [piece["accepted"] for piece in pieces] == [True] * 4 + [False] + [True] * 5 + [False]


async def test_metrics_of_one_choice_only(live: Live) -> None:
    _, answer = await live.chat(speculative={"metrics": "summary"})
    assert answer["metrics"]["speculative_decoding"]["num_spec_tokens"] == 7
    _, several = await live.chat(speculative={"metrics": "summary"}, n=2)
    assert several["metrics"] is None
    assert "metrics" not in (await live.chat())[1]


async def test_a_keys_priority_and_defaults(live: Live, monkeypatch: pytest.MonkeyPatch) -> None:
    key = ApiKey("ada", "0" * 64, best_priority=5, default_priority=7, speculation=False)
    monkeypatch.setattr(chat, "caller_of", lambda request: Caller("ada", key))
    status, answer = await live.chat(priority=4)
    assert (status, answer["error"]["param"]) == (403, "priority")
    assert (await live.chat())[0] == 200
    assert (await live.chat(priority=9, speculative={"enabled": True}))[0] == 200
    first, second = live.engine.requests
    assert (first.tenant, first.priority, first.speculation.enabled) == ("ada", 7, False)
    assert (second.priority, second.speculation.enabled) == (9, True)
