from __future__ import annotations

import asyncio
from typing import Any

import pytest

from tests.api.conftest import Live, Serve
from tests.api.fakes import FakeEngine, endless

MESSAGES: Any = [{"role": "user", "content": "Hi"}]


async def _nothing_left(live: Live) -> None:
    await live.engine.until(lambda: not live.engine.active and live.state.num_in_flight == 0)
    assert len(live.engine.aborted) == len(live.engine.requests)


@pytest.mark.parametrize("n", [1, 3])
async def test_a_client_that_leaves_mid_stream_cancels_its_requests(serve: Serve, n: int) -> None:
    live = await serve(FakeEngine(endless, step_s=0.002))
    stream = await live.client.chat.completions.create(model="fake", messages=MESSAGES, n=n, stream=True)
    async for _ in stream:
        break
    await stream.close()
    await _nothing_left(live)
    assert len(live.engine.requests) == n


@pytest.mark.parametrize("n", [1, 3])
async def test_a_client_that_leaves_before_a_whole_answer_cancels_too(serve: Serve, n: int) -> None:
    live = await serve(FakeEngine(endless, step_s=0.002))
    task = asyncio.create_task(live.chat(n=n))
    await live.engine.until(lambda: len(live.engine.active) == n)
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    await _nothing_left(live)


async def test_a_client_that_leaves_while_nothing_is_emitted_yet(serve: Serve) -> None:
    live = await serve(FakeEngine(endless, step_s=60))
    task = asyncio.create_task(live.chat(stream=True))
    await live.engine.until(lambda: bool(live.engine.active))
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    await _nothing_left(live)


async def test_cancelled_requests_count_as_aborted(serve: Serve) -> None:
    live = await serve(FakeEngine(endless, step_s=0.002))
    stream = await live.client.chat.completions.create(model="fake", messages=MESSAGES, stream=True)
    await anext(aiter(stream))
    await stream.close()
    await _nothing_left(live)
    assert 'outpace_requests_total{arm="control",finish_reason="abort"} 1.0' in (await live.get("/metrics"))[1]


async def test_the_server_goes_on_for_others(serve: Serve) -> None:
    live = await serve(FakeEngine(endless, step_s=0.002))
    first = await live.client.chat.completions.create(model="fake", messages=MESSAGES, stream=True)
    second = await live.client.chat.completions.create(model="fake", messages=MESSAGES, stream=True)
    await first.close()
    await live.engine.until(lambda: len(live.engine.active) == 1)
    iterator = aiter(second)
    for _ in range(20):
        await anext(iterator)
    await second.close()
