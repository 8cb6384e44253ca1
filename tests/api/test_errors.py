from __future__ import annotations

from dataclasses import replace
from typing import Any

import openai
import orjson
import pytest

from server.api.params import Limits
from tests.api.conftest import Live, Serve
from tests.api.fakes import INFO, FakeEngine, endless


@pytest.mark.parametrize(
    ("fields", "param", "code"),
    [
        ({"temperatur": 1}, "temperatur", "unknown_parameter"),
        ({"temperature": -0.1}, "temperature", "invalid_value"),
        ({"temperature": 2.1}, "temperature", "invalid_value"),
        ({"temperature": "1"}, "temperature", "invalid_type"),
        ({"temperature": True}, "temperature", "invalid_type"),
        ({"top_p": -0.1}, "top_p", "invalid_value"),
        ({"top_p": 1.01}, "top_p", "invalid_value"),
        ({"top_k": -2}, "top_k", "invalid_value"),
        ({"top_k": 1.5}, "top_k", "invalid_type"),
        ({"min_p": 1.5}, "min_p", "invalid_value"),
        ({"presence_penalty": 2.5}, "presence_penalty", "invalid_value"),
        ({"frequency_penalty": -2.5}, "frequency_penalty", "invalid_value"),
        ({"repetition_penalty": 0}, "repetition_penalty", "invalid_value"),
        ({"logit_bias": {"65": 101}}, "logit_bias", "invalid_value"),
        ({"logit_bias": {"258": 1}}, "logit_bias", "invalid_value"),
        ({"logit_bias": {"-1": 1}}, "logit_bias", "invalid_value"),
        ({"logit_bias": {"A": 1}}, "logit_bias", "invalid_value"),
        ({"logit_bias": {"²": 1}}, "logit_bias", "invalid_value"),
        ({"logit_bias": [1]}, "logit_bias", "invalid_type"),
        ({"seed": 2**63}, "seed", "invalid_value"),
        ({"seed": 2**70}, "seed", "invalid_type"),
        ({"seed": 1.5}, "seed", "invalid_type"),
        ({"n": 0}, "n", "invalid_value"),
        ({"n": 17}, "n", "invalid_value"),
        ({"n": 129}, "n", "invalid_value"),
        ({"max_tokens": 0}, "max_tokens", "invalid_value"),
        ({"max_completion_tokens": -1}, "max_completion_tokens", "invalid_value"),
        ({"max_tokens": 1, "max_completion_tokens": 2}, "max_tokens", "invalid_value"),
        ({"stop": ""}, "stop", "invalid_value"),
        ({"stop": ["a", ""]}, "stop", "invalid_value"),
        ({"stop": ["a"] * 17}, "stop", "invalid_value"),
        ({"stop": [1]}, "stop[0]", "invalid_type"),
        ({"stop_token_ids": [258]}, "stop_token_ids", "invalid_value"),
        ({"stream_options": {}}, "stream_options", "invalid_value"),
        ({"stream": True, "stream_options": {"usage": True}}, "stream_options.usage", "unknown_parameter"),
        ({"speculative": {"k": 3}}, "speculative.k", "unknown_parameter"),
        ({"speculative": {"max_draft_tokens": -1}}, "speculative.max_draft_tokens", "invalid_value"),
        ({"top_logprobs": 3}, "top_logprobs", "invalid_value"),
        ({"logprobs": True, "top_logprobs": 21}, "top_logprobs", "invalid_value"),
        ({"logprobs": 3}, "logprobs", "invalid_type"),
        ({"response_format": {"type": "json_object"}}, "response_format", "unsupported_parameter"),
        ({"tools": [{"type": "function"}]}, "tools", "unsupported_parameter"),
        ({"tool_choice": "required"}, "tool_choice", "unsupported_parameter"),
        ({"modalities": ["audio"]}, "modalities", "unsupported_parameter"),
        ({"reasoning_effort": "low"}, "reasoning_effort", "unsupported_parameter"),
        ({"functions": []}, "functions", "unsupported_parameter"),
        ({"messages": []}, "messages", "invalid_value"),
        ({"messages": [{"role": "user"}]}, "messages[0].content", "missing_required_parameter"),
        ({"messages": [{"content": "a"}]}, "messages[0].role", "missing_required_parameter"),
        ({"messages": [{"role": "robot", "content": "a"}]}, "messages[0].role", "invalid_value"),
        ({"messages": [{"role": "tool", "content": "a"}]}, "messages[0].role", "unsupported_parameter"),
        ({"messages": [{"role": "user", "content": 1}]}, "messages[0].content", "invalid_type"),
        ({"messages": [{"role": "user", "content": "a", "x": 1}]}, "messages[0].x", "unknown_parameter"),
        (
            {"messages": [{"role": "user", "content": [{"type": "image_url"}]}]},
            "messages[0].content[0].type",
            "unsupported_parameter",
        ),
        (
            {"messages": [{"role": "user", "content": [{"type": "text", "text": 1}]}]},
            "messages[0].content[0].text",
            "invalid_type",
        ),
        (
            {"messages": [{"role": "user", "content": [{"type": "text", "text": "a", "x": 1}]}]},
            "messages[0].content[0].x",
            "unknown_parameter",
        ),
        (
            {"messages": [{"role": "assistant", "content": "a", "tool_calls": [{}]}]},
            "messages[0].tool_calls",
            "unsupported_parameter",
        ),
        ({"messages": [{"role": "user", "content": "forbidden"}]}, "messages", "invalid_value"),
    ],
)
async def test_a_wrong_field_is_named_and_nothing_runs(
    live: Live, fields: dict[str, Any], param: str, code: str
) -> None:
    status, answer = await live.chat(**fields)
    assert status == 400, answer
    error = answer["error"]
    assert error.keys() == {"message", "type", "param", "code"}
    assert (error["type"], error["param"], error["code"]) == ("invalid_request_error", param, code)
    assert param.split("[")[0].split(".")[0] in error["message"] or param == "messages"
    assert not live.engine.requests


async def test_messages_name_value_and_what_is_valid(live: Live) -> None:
    _, unknown = await live.chat(temperatur=1)
    assert unknown["error"]["message"].startswith("Unknown parameter: 'temperatur'. Valid here: frequency_penalty, ")
    _, nested = await live.chat(speculative={"k": 3})
    assert nested["error"]["message"] == (
        "Unknown parameter: 'speculative.k'. Valid here: annotate, enabled, max_draft_tokens, metrics."
    )
    _, out_of_range = await live.chat(temperature=3)
    assert out_of_range["error"]["message"] == "Invalid value for 'temperature': expected `float` <= 2.0, got 3."


@pytest.mark.parametrize(
    "fields",
    [
        {"temperature": 0},
        {"temperature": 2},
        {"top_p": 1},
        {"top_k": 0},
        {"min_p": 1},
        {"n": 16},
        {"stop": "x"},
        {"stop": ["y"] * 16},
        {"seed": -(2**63)},
        {"tools": []},
        {"tool_choice": "none"},
        {"response_format": {"type": "text"}},
        {"modalities": ["text"]},
        {"logit_bias": {}},
        {"max_tokens": 3, "max_completion_tokens": 3},
        {"reasoning_effort": None},
    ],
)
async def test_values_at_the_border_are_accepted(live: Live, fields: dict[str, Any]) -> None:
    status, answer = await live.chat(**fields)
    assert status == 200, answer


@pytest.mark.parametrize(
    ("body", "content_type", "status", "code"),
    [
        (b"{", "application/json", 400, "invalid_json"),
        (b"", "application/json", 400, "invalid_json"),
        (b"[]", "application/json", 400, "invalid_json"),
        (b'"\xff"', "application/json", 400, "invalid_json"),
        (b'{"temperature": NaN}', "application/json", 400, "invalid_json"),
        (b"[" * 100_000, "application/json", 400, "invalid_json"),
        (b'{"a":' * 100_000, "application/json", 400, "invalid_json"),
        (b"{}", "text/plain", 415, "unsupported_media_type"),
        (b"a=b", "application/x-www-form-urlencoded", 415, "unsupported_media_type"),
        (b"{}", "application/json", 400, "missing_required_parameter"),
        (b" " * 5000, "application/json", 413, "request_too_large"),
    ],
)
async def test_a_body_that_is_no_request(serve: Serve, body: bytes, content_type: str, status: int, code: str) -> None:
    limits = Limits(max_body_bytes=4096) if status == 413 else Limits()
    live = await serve(limits=limits)
    headers = {"Content-Type": content_type}
    async with live.http.post(live.url + "/v1/chat/completions", data=body, headers=headers) as response:
        assert response.status == status
        assert response.content_type == "application/json"
        assert (await response.json())["error"]["code"] == code
    assert (await live.chat())[0] == 200, "the server goes on"


async def test_context_length_is_told_with_the_numbers(live: Live) -> None:
    with pytest.raises(openai.BadRequestError) as caught:
        await live.client.chat.completions.create(
            model="fake", messages=[{"role": "user", "content": "Hi"}], max_tokens=248
        )
    assert caught.value.code == "context_length_exceeded"
    assert caught.value.param == "messages"
    assert (
        "This model's maximum context length is 256 tokens. However, you requested 257 tokens "
        "(9 in the messages, 248 in the completion)."
    ) in caught.value.message
    assert (await live.chat(max_tokens=247))[0] == 200


@pytest.mark.parametrize(("num_prompt", "fits"), [(255, True), (256, False), (5000, False)])
async def test_a_prompt_longer_than_the_context(live: Live, num_prompt: int, fits: bool) -> None:
    status, answer = await live.complete(prompt=[1] * num_prompt, max_tokens=1)
    assert status == (200 if fits else 400)
    if not fits:
        assert answer["error"]["code"] == "context_length_exceeded"


async def test_a_kv_pool_smaller_than_the_context_is_the_limit(serve: Serve) -> None:
    live = await serve(FakeEngine(info=replace(INFO, kv_cache_tokens=64)))
    status, answer = await live.complete(prompt=[1] * 60, max_tokens=5)
    assert status == 400
    assert answer["error"]["message"].startswith("This server's KV cache holds 64 tokens. However, you requested 65")
    await live.chat()
    assert live.engine.requests[-1].max_tokens == 64 - 9


async def test_an_unknown_model_is_not_found(live: Live) -> None:
    with pytest.raises(openai.NotFoundError) as caught:
        await live.client.chat.completions.create(model="gpt-4", messages=[{"role": "user", "content": "Hi"}])
    assert caught.value.code == "model_not_found"
    with pytest.raises(openai.NotFoundError):
        await live.client.models.retrieve("gpt-4")


async def test_the_configured_name_is_an_alias(live: Live) -> None:
    assert (await live.chat(model="fake-dir"))[0] == 200


async def test_unknown_url_and_method(live: Live) -> None:
    status, answer = await live.get("/v1/nothing")
    assert (status, answer["error"]["code"]) == (404, "unknown_url")
    async with live.http.get(live.url + "/v1/completions") as response:
        assert (response.status, response.headers["Allow"]) == (405, "POST")
        assert (await response.json())["error"]["code"] == "method_not_allowed"


async def test_a_full_queue_is_429_with_retry_after(serve: Serve) -> None:
    live = await serve(max_waiting=3, max_num_seqs=2)
    live.state.control.counts.add(5)
    with pytest.raises(openai.RateLimitError) as caught:
        await live.client.chat.completions.create(model="fake", messages=[{"role": "user", "content": "Hi"}])
    assert caught.value.response.headers["Retry-After"] == "1"
    assert caught.value.code == "rate_limit_exceeded"
    live.state.control.counts.add(-1)
    assert (await live.chat())[0] == 200


async def test_a_full_queue_is_told_before_the_body_is_read(serve: Serve) -> None:
    live = await serve(max_waiting=1, max_num_seqs=1)
    live.state.control.counts.add(2)
    status, _ = await live.post("/v1/chat/completions", {"no": "request"})
    assert status == 429


async def test_prompts_that_wait_are_bounded_by_their_tokens(serve: Serve) -> None:
    live = await serve(max_waiting_tokens=10)
    assert live.engine.info is not None
    live.state.control.counts.add(1, live.engine.info.kv_cache_tokens + 9)
    status, answer = await live.complete(prompt="a")
    assert status == 200, answer
    status, answer = await live.complete(prompt="ab")
    assert (status, answer["error"]["code"]) == (429, "rate_limit_exceeded")
    live.state.control.counts.add(-1, -(live.engine.info.kv_cache_tokens + 9))
    assert live.state.control.counts.total() == (0, 0)


async def test_what_was_just_handed_over_counts_as_waiting(serve: Serve) -> None:
    live = await serve(FakeEngine(endless, step_s=0.01), max_waiting=1, max_num_seqs=2)
    stream = await live.client.chat.completions.create(
        model="fake", messages=[{"role": "user", "content": "Hi"}], n=3, stream=True
    )
    assert (await live.chat())[0] == 429
    await stream.close()
    await live.engine.until(lambda: live.state.num_in_flight == 0)


async def test_an_unforeseen_error_tells_nothing_and_is_logged(live: Live, caplog: pytest.LogCaptureFixture) -> None:
    def broken(request: Any) -> Any:
        raise KeyError("secret detail")

    live.engine.script = broken
    status, answer = await live.chat()
    assert status == 500
    assert "secret" not in orjson.dumps(answer).decode()
    assert "secret detail" in caplog.text
