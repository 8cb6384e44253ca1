"""LiteLLM, which talks to any OpenAI-compatible server as `openai/NAME`."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator
from typing import Any

import litellm
import openai
import pytest

from tests.api.conftest import Live
from tests.clients.scripted import HELLO, HELLO_TOKENS, KEY, saturated, until_refused

# Its streams read an attribute that pydantic has deprecated.
pytestmark = pytest.mark.filterwarnings("ignore:Accessing the 'model_:pydantic.warnings.PydanticDeprecatedSince211")

HI: Any = [{"role": "user", "content": "Hi"}]
FOREVER: Any = [{"role": "user", "content": "forever"}]


@pytest.fixture(autouse=True)
async def quiet(monkeypatch: pytest.MonkeyPatch) -> AsyncIterator[None]:
    monkeypatch.setattr(litellm, "telemetry", False)
    monkeypatch.setattr(litellm, "suppress_debug_info", True)
    # Its own connections would outlive the event loop that they belong to.
    async with openai.DefaultAsyncHttpxClient() as asynchronous:
        with openai.DefaultHttpxClient() as blocking:
            monkeypatch.setattr(litellm, "aclient_session", asynchronous)
            monkeypatch.setattr(litellm, "client_session", blocking)
            yield
    litellm.in_memory_llm_clients_cache.flush_cache()


def options(live: Live, **fields: Any) -> dict[str, Any]:
    return {"model": "openai/fake", "api_base": f"{live.url}/v1", "api_key": KEY, "max_retries": 0, **fields}


async def test_chat(live: Live) -> None:
    answer: Any = await asyncio.to_thread(litellm.completion, messages=HI, **options(live, n=2))
    assert [choice.message.content for choice in answer.choices] == [HELLO, HELLO]
    assert answer.usage.completion_tokens == 2 * len(HELLO_TOKENS)


async def test_streamed_chat(live: Live) -> None:
    def ask() -> list[Any]:
        return list(litellm.completion(messages=HI, **options(live, stream=True)))

    chunks = await asyncio.to_thread(ask)
    assert "".join(chunk.choices[0].delta.content or "" for chunk in chunks) == HELLO
    stream: Any = await litellm.acompletion(
        messages=HI, **options(live, stream=True, stream_options={"include_usage": True})
    )
    received = [chunk async for chunk in stream]
    assert "".join(chunk.choices[0].delta.content or "" for chunk in received if chunk.choices) == HELLO
    assert received[-1].usage.completion_tokens == len(HELLO_TOKENS)


async def test_completions(live: Live) -> None:
    fields = options(live, model="text-completion-openai/fake", max_tokens=30)
    answer: Any = await litellm.atext_completion(prompt="Hi", **fields)
    assert answer.choices[0].text == HELLO
    stream: Any = await litellm.atext_completion(prompt="Hi", **fields, stream=True)
    assert "".join([chunk.choices[0].text or "" async for chunk in stream]) == HELLO


async def test_log_probabilities(live: Live) -> None:
    answer: Any = await litellm.acompletion(messages=HI, **options(live, logprobs=True, top_logprobs=2))
    tokens = answer.choices[0].logprobs.content
    assert b"".join(bytes(token.bytes) for token in tokens) == HELLO.encode()
    assert len(tokens[0].top_logprobs) == 2


@pytest.mark.parametrize(
    ("fields", "kind", "status"),
    [
        ({"temperature": 3}, litellm.BadRequestError, 400),
        ({"max_tokens": 5000}, litellm.ContextWindowExceededError, 400),
        ({"api_key": "sk-wrong"}, litellm.AuthenticationError, 401),
        ({"extra_body": {"priority": -1}}, litellm.APIError, 403),
        ({"model": "openai/other"}, litellm.NotFoundError, 404),
        ({"messages": FOREVER, "extra_body": {"timeout": 0.1}}, litellm.Timeout, 408),
        ({"messages": [{"role": "user", "content": "fails"}]}, litellm.InternalServerError, 500),
    ],
)
async def test_errors_by_class(live: Live, fields: dict[str, Any], kind: type[Exception], status: int) -> None:
    with pytest.raises(kind) as caught:
        await litellm.acompletion(**options(live, **{"messages": HI, **fields}))
    assert getattr(caught.value, "status_code", None) == status


async def test_a_dead_engine_is_told(live: Live) -> None:
    live.engine.die("it crashed")
    with pytest.raises((litellm.ServiceUnavailableError, litellm.InternalServerError)):
        await litellm.acompletion(messages=HI, **options(live))


async def test_a_full_queue_is_a_429_and_a_retry_gets_through(live: Live) -> None:
    async with saturated(live):
        with pytest.raises(litellm.RateLimitError):
            await litellm.acompletion(messages=HI, **options(live))
        start = time.monotonic()
        task = await until_refused(live, litellm.acompletion(messages=HI, **options(live, max_retries=3)))
    answer: Any = await task
    assert answer.choices[0].message.content == HELLO
    assert time.monotonic() - start > 0.95, "it honours Retry-After"


async def test_a_timeout_cancels(live: Live) -> None:
    with pytest.raises(litellm.Timeout):
        await litellm.acompletion(messages=FOREVER, **options(live, timeout=0.3))
    await live.engine.until(lambda: not live.engine.active)


async def test_leaving_a_stream_cancels(live: Live) -> None:
    stream: Any = await litellm.acompletion(messages=FOREVER, **options(live, stream=True))
    await anext(aiter(stream))
    await stream.aclose()
    await live.engine.until(lambda: not live.engine.active)
