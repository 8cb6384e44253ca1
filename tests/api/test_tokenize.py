from __future__ import annotations

import asyncio
from typing import Any

import pytest

from tests.api.conftest import Live, Serve
from tests.api.fakes import BOS


async def test_a_prompt(live: Live) -> None:
    assert await live.post("/tokenize", {"prompt": "Hé"}) == (
        200,
        {"count": 3, "max_model_len": 256, "tokens": [*"Hé".encode()]},
    )
    assert (await live.post("/tokenize", {"model": "fake", "prompt": ""}))[1]["count"] == 0


async def test_token_strings_are_those_of_log_probabilities(live: Live) -> None:
    _, answer = await live.post("/tokenize", {"prompt": "aé", "return_token_strs": True})
    assert answer["token_strs"] == ["a", "bytes:\\xc3", "bytes:\\xa9"]


async def test_messages_are_what_a_chat_would_have(live: Live) -> None:
    messages = [{"role": "developer", "content": [{"type": "text", "text": "a"}]}]
    _, answer = await live.post("/tokenize", {"messages": messages})
    assert answer["tokens"] == [BOS, *b"system:a\n"]
    await live.chat(messages=messages)
    assert live.engine.requests[0].prompt_ids == answer["tokens"]


async def test_there_and_back(live: Live) -> None:
    text = "Grüße, 世界 \x00"
    _, answer = await live.post("/tokenize", {"prompt": text})
    assert await live.post("/detokenize", {"tokens": answer["tokens"]}) == (200, {"prompt": text})
    assert await live.post("/detokenize", {"tokens": []}) == (200, {"prompt": ""})
    assert (await live.post("/detokenize", {"tokens": [65, 256]}))[1] == {"prompt": "A<eos>"}
    assert (await live.post("/detokenize", {"tokens": [65, 0xC3]}))[1] == {"prompt": "A\ufffd"}


@pytest.mark.parametrize(
    ("path", "body", "param", "code"),
    [
        ("/tokenize", {}, "prompt", "missing_required_parameter"),
        ("/tokenize", {"prompt": "a", "messages": [{"role": "user", "content": "a"}]}, "prompt", "invalid_value"),
        ("/tokenize", {"prompt": 1}, "prompt", "invalid_type"),
        ("/tokenize", {"prompt": "a", "add_generation_prompt": True}, "add_generation_prompt", "invalid_value"),
        (
            "/tokenize",
            {"messages": [{"role": "user", "content": "a"}], "add_special_tokens": True},
            "add_special_tokens",
            "invalid_value",
        ),
        ("/tokenize", {"messages": []}, "messages", "invalid_value"),
        ("/tokenize", {"messages": [{"role": "robot", "content": "a"}]}, "messages[0].role", "invalid_value"),
        ("/tokenize", {"messages": [{"role": "user", "content": "forbidden"}]}, "messages", "invalid_value"),
        ("/tokenize", {"prompt": "a", "chat_template": "x"}, "chat_template", "unknown_parameter"),
        ("/detokenize", {}, "tokens", "missing_required_parameter"),
        ("/detokenize", {"tokens": [258]}, "tokens", "invalid_value"),
        ("/detokenize", {"tokens": [-1]}, "tokens[0]", "invalid_value"),
        ("/detokenize", {"tokens": [True]}, "tokens[0]", "invalid_type"),
        ("/detokenize", {"tokens": "a"}, "tokens", "invalid_type"),
    ],
)
async def test_what_is_wrong_is_named(live: Live, path: str, body: Any, param: str, code: str) -> None:
    status, answer = await live.post(path, body)
    assert (status, answer["error"]["param"], answer["error"]["code"]) == (400, param, code)


async def test_an_unknown_model_and_a_server_that_is_not_ready(serve: Serve) -> None:
    live = await serve()
    for path, body in (("/tokenize", {"prompt": "a"}), ("/detokenize", {"tokens": [1]})):
        assert (await live.post(path, {**body, "model": "gpt-4"}))[0] == 404
    live = await serve(ready=False)
    assert (await live.post("/tokenize", {"prompt": "a"}))[0] == 503
    assert (await live.post("/detokenize", {"tokens": [1]}))[0] == 503


async def test_long_texts_are_worked_on_beside_the_event_loop(live: Live, monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[Any] = []
    real = asyncio.to_thread

    async def watched(function: Any, *args: Any, **kwargs: Any) -> Any:
        calls.append(function)
        return await real(function, *args, **kwargs)

    monkeypatch.setattr(asyncio, "to_thread", watched)
    _, short = await live.post("/tokenize", {"prompt": "a" * 4096})
    assert (short["count"], calls) == (4096, [])
    _, answer = await live.post("/tokenize", {"prompt": "a" * 5000})
    assert (answer["count"], len(calls)) == (5000, 1)
    _, text = await live.post("/detokenize", {"tokens": answer["tokens"]})
    assert (text["prompt"], len(calls)) == ("a" * 5000, 2)
