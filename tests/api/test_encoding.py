"""Long texts: beside the event loop, or not at all."""

from __future__ import annotations

import asyncio
import time
from dataclasses import replace
from pathlib import Path

import pytest

from server.api.encoding import encode_chat, encode_text
from server.api.errors import ApiError
from server.api.prediction import prediction_ids
from server.api.schemas import Prediction
from server.api.text_layer import TextLayer
from tests.api.conftest import Live
from tests.api.fakes import INFO

MEGABYTES = "".join(f"{number} words and {number * 7919} more, " for number in range(100_000))[: 3 * 2**20]


@pytest.fixture(scope="module")
def text(embedded_model_dir: Path) -> TextLayer:
    return TextLayer(embedded_model_dir)


async def _longest_gap(done: asyncio.Event) -> float:
    """Seconds for which the event loop did nothing else."""
    longest, last = 0.0, time.perf_counter()
    while not done.is_set():
        await asyncio.sleep(0.005)
        now = time.perf_counter()
        longest, last = max(longest, now - last), now
    return longest


@pytest.mark.parametrize("kind", ["prompt", "chat", "spelled chat", "prediction"])
async def test_the_event_loop_goes_on_while_megabytes_are_encoded(text: TextLayer, kind: str) -> None:
    done = asyncio.Event()
    gap = asyncio.create_task(_longest_gap(done))
    await asyncio.sleep(0.02)
    start = time.perf_counter()
    if kind == "prompt":
        num_tokens = len(await encode_text(text, MEGABYTES))
    elif kind == "prediction":
        num_tokens = len(await prediction_ids(text, Prediction(type="content", content=MEGABYTES), 10**6))
    else:
        content = MEGABYTES + ("<|im_end|>" if kind == "spelled chat" else "")
        num_tokens = len(await encode_chat(text, [{"role": "user", "content": content}]))
    took = time.perf_counter() - start
    done.set()
    assert num_tokens > 500_000
    assert await gap < min(0.5, 0.6 * took), took


async def test_what_surely_does_not_fit_is_refused_at_once(text: TextLayer) -> None:
    info = replace(INFO, max_model_len=1000, kv_cache_tokens=4096)
    assert text.tokenizer.bound is not None
    at_least = text.tokenizer.bound.at_least(MEGABYTES)
    start = time.perf_counter()
    with pytest.raises(ApiError) as caught:
        await encode_text(text, MEGABYTES, info=info)
    message = (
        f"This model's maximum context length is 1000 tokens. However, your prompt has at least {at_least} tokens. "
        "Please reduce the length of the prompt."
    )
    assert (caught.value.status, caught.value.param, caught.value.message) == (400, "prompt", message)
    assert caught.value.code == "context_length_exceeded"
    with pytest.raises(ApiError) as caught:
        await encode_chat(text, [{"role": "user", "content": MEGABYTES}], info=info)
    assert (caught.value.param, caught.value.code) == ("messages", "context_length_exceeded")
    assert time.perf_counter() - start < 0.5


async def test_the_endpoints_refuse_it(live: Live, text: TextLayer) -> None:
    live.state.control.text = text
    for status, answer in (
        await live.complete(prompt=MEGABYTES[:900_000]),
        await live.chat(messages=[{"role": "user", "content": MEGABYTES[:900_000]}]),
    ):
        assert (status, answer["error"]["code"]) == (400, "context_length_exceeded")
        assert "at least" in answer["error"]["message"]
