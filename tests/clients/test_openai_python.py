"""OpenAI's client for Python, blocking and asynchronous."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Iterator
from typing import Any

import openai
import pytest

from tests.api.conftest import Live
from tests.clients.scripted import HELLO, HELLO_TOKENS, KEY, saturated, until_refused


def said(text: str) -> Any:
    return [{"role": "user", "content": text}]


@pytest.fixture
def client(live: Live) -> Iterator[openai.OpenAI]:
    """Its calls belong on a thread: the server runs in this one."""
    with openai.OpenAI(base_url=f"{live.url}/v1", api_key=KEY, max_retries=0) as client:
        yield client


@pytest.fixture
async def aclient(live: Live) -> AsyncIterator[openai.AsyncOpenAI]:
    async with openai.AsyncOpenAI(base_url=f"{live.url}/v1", api_key=KEY, max_retries=0) as client:
        yield client


async def test_chat(client: openai.OpenAI) -> None:
    answer = await asyncio.to_thread(client.chat.completions.create, model="fake", messages=said("Hi"))
    [choice] = answer.choices
    assert (choice.message.role, choice.message.content, choice.finish_reason) == ("assistant", HELLO, "stop")
    assert answer.usage is not None
    assert (answer.usage.prompt_tokens, answer.usage.completion_tokens) == (9, len(HELLO_TOKENS))
    assert answer.usage.prompt_tokens_details is not None and answer.usage.completion_tokens_details is not None
    assert answer.usage.prompt_tokens_details.cached_tokens == 1
    assert answer.usage.completion_tokens_details.accepted_prediction_tokens == len(HELLO_TOKENS) - 3
    assert answer.id.startswith("chatcmpl-")
    assert answer.system_fingerprint is not None


async def test_streamed_chat(client: openai.OpenAI) -> None:
    def ask() -> list[Any]:
        options: Any = {"stream": True, "stream_options": {"include_usage": True}}
        with client.chat.completions.create(model="fake", messages=said("Hi"), **options) as stream:
            return list(stream)

    *chunks, last = await asyncio.to_thread(ask)
    assert chunks[0].choices[0].delta.role == "assistant"
    assert "".join(chunk.choices[0].delta.content or "" for chunk in chunks) == HELLO
    assert [chunk.choices[0].finish_reason for chunk in chunks if chunk.choices[0].finish_reason] == ["stop"]
    assert (last.choices, last.usage.completion_tokens) == ([], len(HELLO_TOKENS))
    assert len({chunk.id for chunk in chunks}) == 1


async def test_the_stream_helper_accumulates(aclient: openai.AsyncOpenAI) -> None:
    async with aclient.chat.completions.stream(model="fake", messages=said("Hi")) as stream:
        kinds = [event.type async for event in stream]
        final = await stream.get_final_completion()
    assert "content.delta" in kinds and kinds[-1] == "content.done"
    assert final.choices[0].message.content == HELLO


async def test_completions(client: openai.OpenAI, aclient: openai.AsyncOpenAI) -> None:
    whole = await asyncio.to_thread(client.completions.create, model="fake", prompt=["a", "b"], max_tokens=30)
    assert [(choice.index, choice.text) for choice in whole.choices] == [(0, HELLO), (1, HELLO)]
    stream = await aclient.completions.create(model="fake", prompt=[72, 105], max_tokens=30, stream=True)
    assert "".join([chunk.choices[0].text async for chunk in stream]) == HELLO
    echoed = await aclient.completions.create(model="fake", prompt="Hi", max_tokens=30, echo=True)
    assert echoed.choices[0].text == "Hi" + HELLO


async def test_log_probabilities(aclient: openai.AsyncOpenAI) -> None:
    chat = await aclient.chat.completions.create(model="fake", messages=said("Hi"), logprobs=True, top_logprobs=2)
    assert chat.choices[0].logprobs is not None and chat.choices[0].logprobs.content is not None
    tokens = chat.choices[0].logprobs.content
    assert b"".join(bytes(token.bytes or []) for token in tokens) == HELLO.encode()
    assert tokens[0].token == "H"
    assert (tokens[0].logprob, len(tokens[0].top_logprobs)) == (-0.5, 2)
    text = await aclient.completions.create(model="fake", prompt="Hi", max_tokens=30, logprobs=1)
    logprobs = text.choices[0].logprobs
    assert logprobs is not None and logprobs.tokens is not None and logprobs.text_offset is not None
    assert logprobs.tokens[:5] == list("Hello")
    assert logprobs.text_offset[:5] == [0, 1, 2, 3, 4]
    assert len(logprobs.token_logprobs or []) == len(logprobs.top_logprobs or []) == len(logprobs.tokens)


async def test_choices(aclient: openai.AsyncOpenAI) -> None:
    whole = await aclient.chat.completions.create(model="fake", messages=said("Hi"), n=3)
    assert [(choice.index, choice.message.content) for choice in whole.choices] == [(i, HELLO) for i in range(3)]
    texts = ["", ""]
    async for chunk in await aclient.chat.completions.create(model="fake", messages=said("Hi"), n=2, stream=True):
        for choice in chunk.choices:
            texts[choice.index] += choice.delta.content or ""
    assert texts == [HELLO, HELLO]


async def test_models(client: openai.OpenAI) -> None:
    assert await asyncio.to_thread(lambda: [model.id for model in client.models.list()]) == ["fake"]
    assert (await asyncio.to_thread(client.models.retrieve, "fake")).id == "fake"


@pytest.mark.parametrize(
    ("fields", "kind", "status", "code", "param"),
    [
        ({"temperature": 3}, openai.BadRequestError, 400, "invalid_value", "temperature"),
        ({"extra_body": {"temperatur": 1}}, openai.BadRequestError, 400, "unknown_parameter", "temperatur"),
        ({"tools": [{"type": "function"}]}, openai.BadRequestError, 400, "unsupported_parameter", "tools"),
        ({"max_tokens": 5000}, openai.BadRequestError, 400, "context_length_exceeded", "messages"),
        ({"extra_body": {"priority": -1}}, openai.PermissionDeniedError, 403, "insufficient_permissions", "priority"),
        ({"model": "other"}, openai.NotFoundError, 404, "model_not_found", "model"),
        ({"messages": said("fails")}, openai.InternalServerError, 500, "engine_error", None),
    ],
)
async def test_errors_by_class(
    aclient: openai.AsyncOpenAI,
    fields: dict[str, Any],
    kind: type[openai.APIStatusError],
    status: int,
    code: str,
    param: str | None,
) -> None:
    with pytest.raises(kind) as caught:
        await aclient.chat.completions.create(**{"model": "fake", "messages": said("Hi"), **fields})
    assert (caught.value.status_code, caught.value.code, caught.value.param) == (status, code, param)
    assert caught.value.request_id
    assert caught.value.type


async def test_a_wrong_key(live: Live, aclient: openai.AsyncOpenAI) -> None:
    with pytest.raises(openai.AuthenticationError) as caught:
        await aclient.with_options(api_key="sk-wrong").models.list()
    assert (caught.value.status_code, caught.value.code) == (401, "invalid_api_key")


async def test_an_error_before_a_stream_and_one_within(aclient: openai.AsyncOpenAI) -> None:
    with pytest.raises(openai.InternalServerError):
        await aclient.chat.completions.create(model="fake", messages=said("fails"), stream=True)
    stream = await aclient.chat.completions.create(model="fake", messages=said("breaks"), stream=True)
    received = ""

    async def read() -> None:
        nonlocal received
        async for chunk in stream:
            received += chunk.choices[0].delta.content or ""

    with pytest.raises(openai.APIError, match="out of luck") as caught:
        await read()
    assert (received, caught.value.code) == ("Hel", "engine_error")


async def test_a_dead_engine_is_a_503(live: Live, aclient: openai.AsyncOpenAI) -> None:
    live.engine.die("it crashed")
    with pytest.raises(openai.InternalServerError) as caught:
        await aclient.chat.completions.create(model="fake", messages=said("Hi"))
    assert (caught.value.status_code, caught.value.code) == (503, "engine_unavailable")
    assert int(caught.value.response.headers["retry-after"]) >= 1


async def test_a_full_queue_is_a_429(live: Live, aclient: openai.AsyncOpenAI) -> None:
    async with saturated(live):
        with pytest.raises(openai.RateLimitError) as caught:
            await aclient.chat.completions.create(model="fake", messages=said("Hi"))
    assert int(caught.value.response.headers["retry-after"]) >= 1


async def test_retries_wait_as_long_as_they_are_told(live: Live, client: openai.OpenAI) -> None:
    patient = client.with_options(max_retries=3)
    async with saturated(live):
        start = time.monotonic()
        asking = asyncio.to_thread(patient.chat.completions.create, model="fake", messages=said("Hi"))
        task = await until_refused(live, asking)
    answer = await task
    assert answer.choices[0].message.content == HELLO
    assert time.monotonic() - start > 0.95, "Retry-After says a second; the client's own choice would be half of it"


async def test_a_client_that_times_out_cancels_its_request(live: Live, client: openai.OpenAI) -> None:
    with pytest.raises(openai.APITimeoutError):
        await asyncio.to_thread(
            client.with_options(timeout=0.3).chat.completions.create, model="fake", messages=said("forever")
        )
    await live.engine.until(lambda: not live.engine.active)


async def test_the_servers_own_deadline_is_a_408(live: Live, aclient: openai.AsyncOpenAI) -> None:
    with pytest.raises(openai.APIStatusError) as caught:
        await aclient.chat.completions.create(model="fake", messages=said("forever"), extra_body={"timeout": 0.1})
    assert (caught.value.status_code, caught.value.code) == (408, "request_timeout")
    await live.engine.until(lambda: not live.engine.active)


async def test_closing_a_stream_cancels_its_request(live: Live, client: openai.OpenAI) -> None:
    def ask() -> None:
        stream = client.chat.completions.create(model="fake", messages=said("forever"), stream=True, n=2)
        next(iter(stream))
        stream.close()

    await asyncio.to_thread(ask)
    await live.engine.until(lambda: not live.engine.active)
    assert len(live.engine.aborted) == 2
