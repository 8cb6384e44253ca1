from __future__ import annotations

import asyncio
import re
from typing import Any

import openai
import pytest

from server.core import FinishReason, StepOutput
from tests.api.conftest import Live, Serve
from tests.api.fakes import FakeEngine, steps

GOLDEN_STREAM = (
    'data: {"id":"ID","object":"text_completion","created":0,"model":"fake","system_fingerprint":"FP",'
    '"choices":[{"index":0,"text":"Hello","logprobs":null,"finish_reason":null}]}\n\n'
    'data: {"id":"ID","object":"text_completion","created":0,"model":"fake","system_fingerprint":"FP",'
    '"choices":[{"index":0,"text":" world","logprobs":null,"finish_reason":"stop"}]}\n\n'
    "data: [DONE]\n\n"
)


async def test_a_stream_is_framed_byte_for_byte_as_openai_does(live: Live) -> None:
    async with live.http.post(live.url + "/v1/completions", json={"prompt": "Hi", "stream": True}) as response:
        raw = (await response.read()).decode()
    raw = re.sub(r'"id":"cmpl-[0-9a-f]{32}"', '"id":"ID"', raw)
    raw = re.sub(r'"created":\d+', '"created":0', raw)
    assert re.sub(r"fp_[0-9a-f]{10}", "FP", raw) == GOLDEN_STREAM


@pytest.mark.parametrize(
    ("prompt", "token_ids"),
    [
        ("Hi", [[72, 105]]),
        (["Hi", "Ho"], [[72, 105], [72, 111]]),
        ([72, 105], [[72, 105]]),
        ([[72], [73, 74]], [[72], [73, 74]]),
    ],
)
async def test_every_form_of_prompt(live: Live, prompt: Any, token_ids: list[list[int]]) -> None:
    status, answer = await live.complete(prompt=prompt)
    assert status == 200
    assert [request.prompt_ids for request in live.engine.requests] == token_ids
    assert [choice["index"] for choice in answer["choices"]] == list(range(len(token_ids)))
    assert answer["usage"]["prompt_tokens"] == sum(map(len, token_ids))
    assert answer["usage"]["prompt_tokens_details"]["cached_tokens"] == len(token_ids)


@pytest.mark.parametrize(
    "prompt", [[], "", [""], [[]], [[], [1]], ["a", 1], [[1], "a"], [1.5], [True], {"a": 1}, 7, [["a"]]]
)
async def test_a_prompt_of_any_other_form_is_refused(live: Live, prompt: Any) -> None:
    status, answer = await live.complete(prompt=prompt)
    assert (status, answer["error"]["param"], answer["error"]["code"]) == (400, "prompt", "invalid_value")
    assert not live.engine.requests


@pytest.mark.parametrize("token_id", [-1, 258, 2**70])
async def test_a_token_id_out_of_range_is_named(live: Live, token_id: int) -> None:
    status, answer = await live.complete(prompt=[1, token_id])
    assert (status, answer["error"]["param"]) == (400, "prompt")
    if token_id < 2**64:
        assert answer["error"]["message"] == (
            f"Invalid value for 'prompt': token id {token_id} is out of range; use 0 to 257."
        )


async def test_choices_of_several_prompts_are_in_order(serve: Serve) -> None:
    live = await serve(FakeEngine(lambda r: steps(f"{bytes(r.prompt_ids).decode()}{r.choice}")(r)))
    _, answer = await live.complete(prompt=["a", "b"], n=2)
    assert [choice["text"] for choice in answer["choices"]] == ["a0", "a1", "b0", "b1"]
    assert answer["usage"]["prompt_tokens"] == 2
    seeds = [request.sampling.seed for request in live.engine.requests]
    assert seeds[0] == seeds[1] != seeds[2] == seeds[3], "unseeded prompts are independent"


async def test_a_seed_holds_for_every_prompt(live: Live) -> None:
    await live.complete(prompt=["a", "b"], seed=7)
    assert [request.sampling.seed for request in live.engine.requests] == [7, 7]


async def test_sixteen_tokens_by_default(live: Live) -> None:
    await live.complete()
    assert live.engine.requests[0].max_tokens == 16


async def test_logprobs(serve: Serve) -> None:
    live = await serve(FakeEngine(steps("ab", b"\xc3", b"\xa9")))
    _, answer = await live.complete(logprobs=2)
    assert answer["choices"][0]["logprobs"] == {
        "tokens": ["a", "b", "bytes:\\xc3", "bytes:\\xa9"],
        "token_logprobs": [-0.5] * 4,
        "top_logprobs": [
            {"a": -0.5, "x": -9999.0},
            {"b": -0.5, "x": -9999.0},
            {"bytes:\\xc3": -0.5, "x": -9999.0},
            {"bytes:\\xa9": -0.5, "x": -9999.0},
        ],
        "text_offset": [0, 1, 2, 2],
    }


async def test_logprobs_zero_still_names_the_chosen_token(live: Live) -> None:
    answer = await live.client.completions.create(model="fake", prompt="Hi", logprobs=0)
    logprobs = answer.choices[0].logprobs
    assert logprobs is not None and logprobs.tokens is not None and logprobs.top_logprobs is not None
    assert logprobs.tokens[0] == "H"
    assert logprobs.top_logprobs[0] == {"H": -0.5}


async def test_streamed_logprobs_add_up_to_the_whole(live: Live) -> None:
    _, whole = await live.complete(logprobs=1)
    tokens: list[str] = []
    offsets: list[int] = []
    stream = await live.client.completions.create(model="fake", prompt="Hi", logprobs=1, stream=True)
    async for chunk in stream:
        logprobs = chunk.choices[0].logprobs
        assert logprobs is not None and logprobs.tokens is not None and logprobs.text_offset is not None
        tokens += logprobs.tokens
        offsets += logprobs.text_offset
    assert tokens == whole["choices"][0]["logprobs"]["tokens"]
    assert offsets == whole["choices"][0]["logprobs"]["text_offset"] == list(range(11))


async def test_an_incomplete_character_at_the_end_becomes_a_replacement(serve: Serve) -> None:
    live = await serve(FakeEngine(steps(b"a\xc3", finish=FinishReason.LENGTH)))
    _, answer = await live.complete(logprobs=0)
    assert answer["choices"][0]["text"] == "a�"
    assert answer["choices"][0]["logprobs"]["text_offset"] == [0, 1]


async def test_a_suffix_is_refused(live: Live) -> None:
    status, answer = await live.complete(suffix="x")
    assert (status, answer["error"]["code"], answer["error"]["param"]) == (400, "unsupported_parameter", "suffix")


@pytest.mark.parametrize("fields", [{"echo": False}, {"suffix": ""}, {"best_of": 1}, {"best_of": 2, "n": 2}])
async def test_neutral_values_of_those_are_accepted(live: Live, fields: dict[str, Any]) -> None:
    assert (await live.complete(**fields))[0] == 200


async def test_too_many_completions_in_all(live: Live) -> None:
    status, answer = await live.complete(prompt=["a"] * 17, n=16)
    assert (status, answer["error"]["param"]) == (400, "prompt")
    assert "17 prompts with n=16" in answer["error"]["message"]


async def test_token_ids(live: Live) -> None:
    _, answer = await live.complete(return_token_ids=True)
    choice = answer["choices"][0]
    assert (choice["prompt_token_ids"], choice["token_ids"]) == ([72, 105], [*b"Hello world", 256])
    _, without = await live.complete()
    assert "token_ids" not in without["choices"][0]


async def test_special_tokens_show_on_request(live: Live) -> None:
    live.engine.script = lambda request: [StepOutput(request.request_id, [97, 256, 98], None, FinishReason.LENGTH)]
    _, hidden = await live.complete()
    _, shown = await live.complete(skip_special_tokens=False)
    assert (hidden["choices"][0]["text"], shown["choices"][0]["text"]) == ("ab", "a<eos>b")


async def test_the_synchronous_client_works_too(live: Live) -> None:
    def ask() -> tuple[str, str]:
        with openai.OpenAI(base_url=live.url + "/v1", api_key="none", max_retries=0) as client:
            whole = client.completions.create(model="fake", prompt="Hi").choices[0].text
            chunks = client.completions.create(model="fake", prompt="Hi", stream=True)
            return whole, "".join(chunk.choices[0].text for chunk in chunks)

    assert await asyncio.to_thread(ask) == ("Hello world", "Hello world")
