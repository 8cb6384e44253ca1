"""LangChain's chat model and its older completion model."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Callable
from contextlib import aclosing
from typing import Any

import openai
import pytest
from langchain_core.messages import HumanMessage
from langchain_openai import ChatOpenAI, OpenAI
from pydantic import SecretStr

from tests.api.conftest import Live
from tests.clients.scripted import HELLO, HELLO_TOKENS, KEY, saturated, until_refused


@pytest.fixture
async def http() -> AsyncIterator[dict[str, Any]]:
    """Connections that end with the test: LangChain would keep its own beyond the event loop that they belong to."""
    async with openai.DefaultAsyncHttpxClient() as http_async_client:
        with openai.DefaultHttpxClient() as http_client:
            yield {"http_client": http_client, "http_async_client": http_async_client}


@pytest.fixture
def chat(live: Live, http: dict[str, Any]) -> Callable[..., ChatOpenAI]:
    def make(**fields: Any) -> ChatOpenAI:
        options: dict[str, Any] = {"model": "fake", "max_retries": 0, "api_key": SecretStr(KEY), **http, **fields}
        return ChatOpenAI(base_url=f"{live.url}/v1", **options)

    return make


@pytest.fixture
def completions(live: Live, http: dict[str, Any]) -> Callable[..., OpenAI]:
    def make(**fields: Any) -> OpenAI:
        options: dict[str, Any] = {"model": "fake", "max_retries": 0, "api_key": SecretStr(KEY), **http}
        return OpenAI(base_url=f"{live.url}/v1", **{**options, "max_tokens": 30, **fields})

    return make


async def test_chat(live: Live, chat: Callable[..., ChatOpenAI]) -> None:
    whole = await asyncio.to_thread(chat().invoke, "Hi")
    assert whole.content == HELLO
    assert whole.usage_metadata is not None
    assert whole.usage_metadata["output_tokens"] == len(HELLO_TOKENS)
    assert whole.response_metadata["finish_reason"] == "stop"
    messages = [("system", "Be kind."), ("human", "Hi")]
    assert (await chat().ainvoke(messages)).content == HELLO
    assert bytes(live.engine.requests[-1].prompt_ids[1:]) == b"system:Be kind.\nuser:Hi\n"


async def test_streamed_chat(chat: Callable[..., ChatOpenAI]) -> None:
    assert await asyncio.to_thread(lambda: [c.content for c in chat().stream("Hi") if c.content]) == [
        "Hello",
        " wörld",
    ]
    chunks = [chunk async for chunk in chat(stream_usage=True).astream("Hi")]
    assert "".join(str(chunk.content) for chunk in chunks) == HELLO
    assert [c.usage_metadata["output_tokens"] for c in chunks if c.usage_metadata] == [len(HELLO_TOKENS)]


async def test_choices_and_log_probabilities(chat: Callable[..., ChatOpenAI]) -> None:
    result = await chat(n=2, logprobs=True, top_logprobs=2).agenerate([[HumanMessage("Hi")]])
    assert [generation.text for generation in result.generations[0]] == [HELLO, HELLO]
    answer = await chat(logprobs=True, top_logprobs=2).ainvoke("Hi")
    tokens = answer.response_metadata["logprobs"]["content"]
    assert b"".join(bytes(token["bytes"]) for token in tokens) == HELLO.encode()
    assert len(tokens[0]["top_logprobs"]) == 2


async def test_completions(completions: Callable[..., OpenAI]) -> None:
    assert await asyncio.to_thread(completions().invoke, "Hi") == HELLO
    assert "".join([piece async for piece in completions().astream("Hi")]) == HELLO
    batch = await completions().abatch(["a", "b"])
    assert batch == [HELLO, HELLO]


async def test_completions_with_best_of_and_log_probabilities(completions: Callable[..., OpenAI]) -> None:
    result = await completions(n=2, best_of=2, logprobs=1).agenerate(["Hi"])
    assert [generation.text for generation in result.generations[0]] == [HELLO, HELLO]
    info = result.generations[0][0].generation_info
    assert info is not None
    assert info["logprobs"]["tokens"][:5] == list("Hello")


@pytest.mark.parametrize(
    ("fields", "kind"),
    [
        ({"temperature": 3}, openai.BadRequestError),
        ({"api_key": SecretStr("sk-wrong")}, openai.AuthenticationError),
        ({"extra_body": {"priority": -1}}, openai.PermissionDeniedError),
        ({"model": "other"}, openai.NotFoundError),
        ({"max_tokens": 5000}, openai.BadRequestError),
    ],
)
async def test_errors_by_class(chat: Callable[..., ChatOpenAI], fields: dict[str, Any], kind: type[Exception]) -> None:
    with pytest.raises(kind):
        await chat(**fields).ainvoke("Hi")


async def test_an_error_within_a_stream(chat: Callable[..., ChatOpenAI]) -> None:
    received = ""

    async def read() -> None:
        nonlocal received
        async for chunk in chat().astream("breaks"):
            received += str(chunk.content)

    with pytest.raises(openai.APIError, match="out of luck"):
        await read()
    assert received == "Hel"


async def test_a_full_queue_is_a_429_and_a_retry_gets_through(live: Live, chat: Callable[..., ChatOpenAI]) -> None:
    async with saturated(live):
        with pytest.raises(openai.RateLimitError):
            await chat().ainvoke("Hi")
        start = time.monotonic()
        task = await until_refused(live, chat(max_retries=3).ainvoke("Hi"))
    assert (await task).content == HELLO
    assert time.monotonic() - start > 0.95, "it honours Retry-After"


async def test_a_timeout_cancels(live: Live, chat: Callable[..., ChatOpenAI]) -> None:
    with pytest.raises(openai.APITimeoutError):
        await chat(timeout=0.3).ainvoke("forever")
    await live.engine.until(lambda: not live.engine.active)


async def test_leaving_a_stream_cancels(live: Live, chat: Callable[..., ChatOpenAI]) -> None:
    async with aclosing(chat().astream("forever")) as stream:  # type: ignore[type-var]
        async for chunk in stream:
            if chunk.content:
                break
    await live.engine.until(lambda: not live.engine.active)
