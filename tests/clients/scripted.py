"""The server that every client talks to: keys, a short queue, and an engine that does what the prompt says."""

from __future__ import annotations

import asyncio
import hashlib
import re
from collections.abc import AsyncIterator, Coroutine, Sequence
from contextlib import AsyncExitStack, asynccontextmanager
from pathlib import Path
from typing import Any, TypeVar

from server.core import Request, StepOutput
from tests.api.conftest import Live, Serve
from tests.api.fakes import FakeEngine, endless, failing, steps

T = TypeVar("T")
KEY = "sk-outpace-for-tests"
HELLO = "Hello wörld"
HELLO_TOKENS = [*HELLO.encode(), 256]


def script(request: Request) -> Sequence[StepOutput]:
    """`forever` never ends, `breaks` fails in the middle, `fails` before anything; all else is greeted."""
    prompt = bytes(token for token in request.prompt_ids if token < 256)
    if b"forever" in prompt:
        return endless(request)
    if b"breaks" in prompt:
        return failing("out of luck", "Hel")(request)
    if b"fails" in prompt:
        return failing("out of luck")(request)
    return steps("Hello", " wörld")(request)


async def start(serve: Serve, folder: Path) -> Live:
    """One key; four sequences run and one may wait. Steps take 2 ms, so that a client can leave between two."""
    keys = folder / "keys.toml"
    keys.write_text(f'[[key]]\nname = "alice"\nsha256 = "{hashlib.sha256(KEY.encode()).hexdigest()}"\n')
    engine = FakeEngine(script, step_s=0.002)
    return await serve(engine, server={"api_keys": str(keys)}, max_num_seqs=4, max_waiting=1)


@asynccontextmanager
async def saturated(live: Live) -> AsyncIterator[None]:
    """As long as this is held, everything else is answered 429."""
    body = {"prompt": "forever", "stream": True, "max_tokens": 100}
    headers = {"Authorization": f"Bearer {KEY}"}
    async with AsyncExitStack() as streams:
        for _ in range(20):
            asked = live.http.post(f"{live.url}/v1/completions", json=body, headers=headers)
            response = await streams.enter_async_context(asked)
            if response.status == 429:
                break
        else:
            raise AssertionError("the queue is never full")
        yield


async def until_refused(live: Live, asking: Coroutine[Any, Any, T]) -> asyncio.Task[T]:
    """Starts `asking` and returns once something was answered 429."""
    before = await _num_refused(live)
    task = asyncio.create_task(asking)
    async with asyncio.timeout(30):
        while await _num_refused(live) == before:  # noqa: ASYNC110 - a test polls
            await asyncio.sleep(0.01)
    return task


async def _num_refused(live: Live) -> int:
    text = (await live.get("/metrics"))[1]
    return sum(int(float(n)) for n in re.findall(r'^outpace_http_requests_total{.*status="429"} (\S+)$', text, re.M))
