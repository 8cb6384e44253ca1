"""Engines of benchmarks that share a runner."""

from __future__ import annotations

from pathlib import Path

import pytest

from benchmarks.engine import another, build, run
from server.core import SamplingParams
from server.engine.core import EngineCore

GREEDY = SamplingParams(temperature=0.0)
PROMPTS = [[5, 6, 7, 8] * 6, [40 + i for i in range(40)], [9, 80, 9, 80, 9]]


@pytest.fixture(scope="module")
def first(tiny_llama_dir: Path) -> EngineCore:
    model = str(tiny_llama_dir)
    return build(
        "suffix", model=model, device="cpu", prefix_cache=False, kv_cache_tokens=800, max_num_seqs=4, adaptive=False
    )


def test_another_says_the_same(first: EngineCore) -> None:
    expected = run(first, PROMPTS, 40, GREEDY).tokens
    small = another(first, kv_cache_tokens=96, max_num_batched_tokens=7)
    assert run(small, PROMPTS, 40, GREEDY).tokens == expected
    assert small.stats().num_preemptions > 0
    cached = another(small, prefix_cache=True)
    for _ in range(2):
        assert run(cached, PROMPTS, 40, GREEDY).tokens == expected
    assert cached.stats().num_cached_tokens > 0
    assert cached.stats().num_preemptions == 0
    assert cached.runner is first.runner


@pytest.mark.parametrize("limits", [{"kv_cache_tokens": 801}, {"max_num_seqs": 5}, {"max_model_len": 513}])
def test_a_runner_has_its_sizes(first: EngineCore, limits: dict[str, int]) -> None:
    with pytest.raises(ValueError, match="too large"):
        another(first, **limits)
