from __future__ import annotations

import re
from typing import Any

import openai
import pytest
from openai.types.chat import ChatCompletionMessageParam

from server.core import FinishReason
from tests.api.conftest import Live, Serve
from tests.api.fakes import BOS, FakeEngine, endless, failing, steps

USER: list[ChatCompletionMessageParam] = [{"role": "user", "content": "Hi"}]

GOLDEN_STREAM = (
    'data: {"id":"ID","object":"chat.completion.chunk","created":0,"model":"fake","system_fingerprint":"FP",'
    '"choices":[{"index":0,"delta":{"role":"assistant","content":"","refusal":null},"logprobs":null,'
    '"finish_reason":null}],"usage":null}\n\n'
    'data: {"id":"ID","object":"chat.completion.chunk","created":0,"model":"fake","system_fingerprint":"FP",'
    '"choices":[{"index":0,"delta":{"content":"Hello"},"logprobs":null,"finish_reason":null}],"usage":null}\n\n'
    'data: {"id":"ID","object":"chat.completion.chunk","created":0,"model":"fake","system_fingerprint":"FP",'
    '"choices":[{"index":0,"delta":{"content":" world"},"logprobs":null,"finish_reason":null}],"usage":null}\n\n'
    'data: {"id":"ID","object":"chat.completion.chunk","created":0,"model":"fake","system_fingerprint":"FP",'
    '"choices":[{"index":0,"delta":{},"logprobs":null,"finish_reason":"stop"}],"usage":null}\n\n'
    'data: {"id":"ID","object":"chat.completion.chunk","created":0,"model":"fake","system_fingerprint":"FP",'
    '"choices":[],"usage":{"prompt_tokens":9,"completion_tokens":12,"total_tokens":21,"prompt_tokens_details":{"cached_tokens":1},'
    '"completion_tokens_details":{"accepted_prediction_tokens":9,"rejected_prediction_tokens":2}}}\n\n'
    "data: [DONE]\n\n"
)


def _anonymous(raw: str) -> str:
    raw = re.sub(r'"id":"chatcmpl-[0-9a-f]{32}"', '"id":"ID"', raw)
    raw = re.sub(r'"created":\d+', '"created":0', raw)
    return re.sub(r'"system_fingerprint":"fp_[0-9a-f]{10}"', '"system_fingerprint":"FP"', raw)


async def _raw_stream(live: Live, **fields: Any) -> str:
    body = {"messages": [{"role": "user", "content": "Hi"}], "stream": True, **fields}
    async with live.http.post(live.url + "/v1/chat/completions", json=body) as response:
        assert response.status == 200
        return (await response.read()).decode()


async def test_a_stream_is_framed_byte_for_byte_as_openai_does(live: Live) -> None:
    assert _anonymous(await _raw_stream(live, stream_options={"include_usage": True})) == GOLDEN_STREAM


async def test_without_include_usage_no_chunk_mentions_usage(live: Live) -> None:
    raw = await _raw_stream(live)
    assert "usage" not in raw
    assert raw.endswith("data: [DONE]\n\n")


async def test_stream_headers_keep_proxies_from_buffering(live: Live) -> None:
    body = {"messages": [{"role": "user", "content": "Hi"}], "stream": True}
    async with live.http.post(live.url + "/v1/chat/completions", json=body) as response:
        assert response.headers["Content-Type"] == "text/event-stream; charset=utf-8"
        assert response.headers["Cache-Control"] == "no-cache"
        assert response.headers["X-Accel-Buffering"] == "no"
        assert response.headers["x-request-id"].startswith("req-")


async def test_openai_client_reads_a_whole_answer(live: Live) -> None:
    answer = await live.client.chat.completions.create(model="fake", messages=USER)
    assert answer.choices[0].message.content == "Hello world"
    assert answer.choices[0].message.role == "assistant"
    assert answer.choices[0].finish_reason == "stop"
    assert answer.usage is not None
    assert (answer.usage.prompt_tokens, answer.usage.completion_tokens, answer.usage.total_tokens) == (9, 12, 21)
    assert answer.usage.prompt_tokens_details is not None and answer.usage.completion_tokens_details is not None
    assert answer.usage.prompt_tokens_details.cached_tokens == 1
    assert answer.usage.completion_tokens_details.accepted_prediction_tokens == 9
    assert answer.usage.completion_tokens_details.rejected_prediction_tokens == 2
    assert live.engine.requests[0].prompt_ids == [BOS, *b"user:Hi\n"]


async def test_an_answer_can_be_sent_back_as_the_client_holds_it(live: Live) -> None:
    first = await live.client.chat.completions.create(model="fake", messages=USER)
    messages: list[Any] = [*USER, first.choices[0].message, {"role": "user", "content": "?"}]
    await live.client.chat.completions.create(model="fake", messages=messages)
    assert bytes(live.engine.requests[1].prompt_ids[1:]) == b"user:Hi\nassistant:Hello world\nuser:?\n"


async def test_openai_client_reads_a_stream(live: Live) -> None:
    stream = await live.client.chat.completions.create(
        model="fake", messages=USER, stream=True, stream_options={"include_usage": True}
    )
    chunks = [chunk async for chunk in stream]
    assert chunks[0].choices[0].delta.role == "assistant"
    assert "".join(c.choices[0].delta.content or "" for c in chunks if c.choices) == "Hello world"
    assert [c.choices[0].finish_reason for c in chunks if c.choices][-1] == "stop"
    assert chunks[-1].usage is not None and chunks[-1].usage.total_tokens == 21
    assert len({c.id for c in chunks}) == 1


async def test_choices_interleave_and_each_has_its_own_text(serve: Serve) -> None:
    replies = ["zero", "one", "two"]
    live = await serve(FakeEngine(lambda request: steps(*replies[request.choice])(request), step_s=0.001))
    stream = await live.client.chat.completions.create(model="fake", messages=USER, n=3, stream=True)
    texts, order = ["", "", ""], []
    async for chunk in stream:
        choice = chunk.choices[0]
        texts[choice.index] += choice.delta.content or ""
        order.append(choice.index)
    assert texts == replies
    assert order[:3] == [0, 1, 2], "every choice opens with its role"
    assert order != sorted(order), "the choices run at the same time"
    assert [request.choice for request in live.engine.requests] == [0, 1, 2]
    assert len({request.sampling.seed for request in live.engine.requests}) == 1


async def test_whole_answer_with_choices_counts_the_prompt_once(serve: Serve) -> None:
    live = await serve(FakeEngine(steps("ab", finish=FinishReason.LENGTH)))
    _, answer = await live.chat(n=2, max_tokens=2)
    assert [choice["message"]["content"] for choice in answer["choices"]] == ["ab", "ab"]
    assert [choice["finish_reason"] for choice in answer["choices"]] == ["length", "length"]
    assert answer["usage"]["prompt_tokens"] == 9
    assert answer["usage"]["completion_tokens"] == 4
    assert answer["usage"]["prompt_tokens_details"]["cached_tokens"] == 1


async def test_logprobs_have_tokens_bytes_and_alternatives(live: Live) -> None:
    _, answer = await live.chat(logprobs=True, top_logprobs=2)
    content = answer["choices"][0]["logprobs"]["content"]
    assert "".join(entry["token"] for entry in content) == "Hello world", "the end-of-sequence token is no text"
    assert content[0] == {
        "token": "H",
        "logprob": -0.5,
        "bytes": [72],
        "top_logprobs": [
            {"token": "H", "logprob": -0.5, "bytes": [72]},
            {"token": "x", "logprob": -9999.0, "bytes": [120]},
        ],
    }


async def test_logprobs_without_alternatives(live: Live) -> None:
    answer = await live.client.chat.completions.create(model="fake", messages=USER, logprobs=True)
    assert answer.choices[0].logprobs is not None and answer.choices[0].logprobs.content is not None
    assert answer.choices[0].logprobs.content[0].top_logprobs == []
    assert live.engine.requests[0].sampling.logprobs == 0


async def test_logprobs_of_a_split_character_show_bytes(serve: Serve) -> None:
    live = await serve(FakeEngine(steps(b"\xc3", b"\xa9")))
    _, answer = await live.chat(logprobs=True)
    assert answer["choices"][0]["message"]["content"] == "é"
    assert [entry["token"] for entry in answer["choices"][0]["logprobs"]["content"]] == ["bytes:\\xc3", "bytes:\\xa9"]


@pytest.mark.parametrize("stream", [False, True])
async def test_a_stop_string_across_steps_never_leaks_and_aborts_the_engine(serve: Serve, stream: bool) -> None:
    live = await serve(FakeEngine(steps("abc<", "en", "d>never", "at all")))
    if stream:
        raw = await _raw_stream(live, stop="<end>", logprobs=True, stream_options={"include_usage": True})
        assert "<" not in raw and "never" not in raw
        assert '"content":"abc"' in raw and '"finish_reason":"stop"' in raw
        assert '"completion_tokens":8,' in raw
    else:
        _, answer = await live.chat(stop=["nothing", "<end>"], logprobs=True)
        choice = answer["choices"][0]
        assert choice["message"]["content"] == "abc"
        assert [entry["token"] for entry in choice["logprobs"]["content"]] == ["a", "b", "c"]
        assert choice["finish_reason"] == "stop"
        assert answer["usage"]["completion_tokens"] == 8, "up to the token that completed the match"
        details = answer["usage"]["completion_tokens_details"]
        assert details["accepted_prediction_tokens"] == 3 + 1 + 2
    assert live.engine.aborted == [live.engine.requests[0].request_id]


async def test_what_looked_like_a_stop_string_is_released_at_the_end(serve: Serve) -> None:
    live = await serve(FakeEngine(steps("abc<e", finish=FinishReason.LENGTH)))
    _, answer = await live.chat(stop="<end>", logprobs=True)
    choice = answer["choices"][0]
    assert (choice["message"]["content"], choice["finish_reason"]) == ("abc<e", "length")
    assert len(choice["logprobs"]["content"]) == 5


async def test_a_stop_token_is_no_part_of_the_text(serve: Serve) -> None:
    live = await serve(FakeEngine(steps("abZ", eos=False)))
    _, answer = await live.chat(stop_token_ids=[ord("Z")])
    assert answer["choices"][0]["message"]["content"] == "ab"
    assert answer["usage"]["completion_tokens"] == 3


async def test_the_same_token_counts_as_text_where_it_did_not_stop(serve: Serve) -> None:
    live = await serve(FakeEngine(steps("abZ", finish=FinishReason.LENGTH)))
    _, answer = await live.chat(max_tokens=3)
    assert answer["choices"][0]["message"]["content"] == "abZ"


async def test_all_sampling_fields_reach_the_engine(live: Live) -> None:
    status, _ = await live.chat(
        temperature=0.5,
        top_p=0.9,
        top_k=-1,
        min_p=0.1,
        presence_penalty=1,
        frequency_penalty=-1,
        repetition_penalty=1.1,
        logit_bias={"65": -100, "66": 2.5},
        seed=-5,
        max_completion_tokens=7,
        stop_token_ids=[1, 2],
        ignore_eos=True,
        speculative={"enabled": False, "max_draft_tokens": 3},
        min_tokens=2,
        priority=-4,
        user="u",
        metadata={"a": "b"},
        store=True,
        service_tier="auto",
    )
    assert status == 200
    request = live.engine.requests[0]
    sampling = request.sampling
    assert (sampling.temperature, sampling.top_p, sampling.top_k, sampling.min_p) == (0.5, 0.9, 0, 0.1)
    assert (sampling.presence_penalty, sampling.frequency_penalty, sampling.repetition_penalty) == (1.0, -1.0, 1.1)
    assert sampling.logit_bias == {65: -100.0, 66: 2.5}
    assert (sampling.seed, sampling.logprobs) == (-5, None)
    assert (request.max_tokens, request.stop_token_ids, request.ignore_eos) == (7, [1, 2], True)
    assert (request.speculation.enabled, request.speculation.max_draft_tokens) == (False, 3)
    assert (request.min_tokens, request.priority, request.tenant) == (2, -4, "")


async def test_defaults_are_openais(live: Live) -> None:
    await live.chat(temperature=None, top_p=None, n=None, stop=None)
    await live.chat()
    first, second = live.engine.requests
    assert (first.sampling.temperature, first.sampling.top_p, first.sampling.top_k) == (1.0, 1.0, 0)
    assert first.max_tokens == 256 - 9, "whatever fits"
    assert first.sampling.seed != second.sampling.seed
    assert 0 <= first.sampling.seed < 2**63


async def test_content_parts_and_the_developer_role(live: Live) -> None:
    parts = [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]
    messages = [{"role": "developer", "content": "Be brief"}, {"role": "user", "content": parts}]
    status, _ = await live.post("/v1/chat/completions", {"messages": messages})
    assert status == 200
    assert bytes(live.engine.requests[0].prompt_ids[1:]) == b"system:Be brief\nuser:a\nb\n"


async def test_an_error_before_the_first_token_has_its_own_status(serve: Serve) -> None:
    live = await serve(FakeEngine(failing("out of blocks")))
    with pytest.raises(openai.InternalServerError) as caught:
        await live.client.chat.completions.create(model="fake", messages=USER, stream=True)
    assert caught.value.status_code == 500
    assert caught.value.body == {
        "message": "out of blocks",
        "type": "server_error",
        "param": None,
        "code": "engine_error",
    }


async def test_an_error_in_a_begun_stream_is_an_event_and_ends_it(serve: Serve) -> None:
    live = await serve(FakeEngine(failing("out of blocks", "par", "tial")))
    raw = await _raw_stream(live)
    assert '"content":"tial"' in raw
    last = raw.rstrip("\n").rsplit("\n\n", 1)[1]
    assert last == (
        'data: {"error":{"message":"out of blocks","type":"server_error","param":null,"code":"engine_error"}}'
    )
    stream = await live.client.chat.completions.create(model="fake", messages=USER, stream=True)
    with pytest.raises(openai.APIError, match="out of blocks"):
        async for _ in stream:
            pass


async def test_one_failed_choice_fails_the_request_and_aborts_the_others(serve: Serve) -> None:
    def script(request: Any) -> Any:
        return failing("broken", "a")(request) if request.choice == 1 else endless(request)

    live = await serve(FakeEngine(script, step_s=0.001))
    status, answer = await live.chat(n=3)
    assert (status, answer["error"]["message"]) == (500, "broken")
    await live.engine.until(lambda: not live.engine.active)
    assert len(live.engine.aborted) == 2
    assert live.state.num_in_flight == 0


async def test_an_engine_that_dies_is_a_503(serve: Serve) -> None:
    live = await serve(FakeEngine(endless, step_s=0.005))
    stream = await live.client.chat.completions.create(model="fake", messages=USER, stream=True)
    await anext(aiter(stream))
    live.engine.die("The engine process was killed (signal 9).")
    with pytest.raises(openai.APIError, match="signal 9"):
        async for _ in stream:
            pass
    with pytest.raises(openai.InternalServerError) as caught:
        await live.client.chat.completions.create(model="fake", messages=USER)
    assert caught.value.status_code == 503
    assert caught.value.response.headers["Retry-After"] == "1"
    assert (await live.get("/health"))[0] == 200


@pytest.mark.parametrize("include", [True, False])
async def test_every_chunk_may_tell_the_usage_so_far(serve: Serve, include: bool) -> None:
    """How tools of others count the tokens of a chunk that carries several."""
    live = await serve(FakeEngine(steps("He", "llo", b"\xc3", b"\xa9")))
    options: Any = {"include_usage": include, "continuous_usage_stats": True}
    stream = await live.client.chat.completions.create(model="fake", messages=USER, stream=True, stream_options=options)
    chunks = [chunk async for chunk in stream]
    told = [
        (chunk.choices[0].delta.content, chunk.usage.completion_tokens)
        for chunk in chunks
        if chunk.choices and chunk.usage is not None
    ]
    assert told == [("He", 2), ("llo", 5), ("\N{LATIN SMALL LETTER E WITH ACUTE}", 8), (None, 8)]
    assert chunks[1].usage is not None and chunks[1].usage.prompt_tokens == 9
    assert [chunk.usage.total_tokens for chunk in chunks if not chunk.choices and chunk.usage] == [17] * include
    assert len(chunks) == 5 + include, "no chunk without text"
