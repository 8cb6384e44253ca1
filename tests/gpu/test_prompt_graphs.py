"""Prompt chunks from CUDA graphs say what they say launched one kernel at a time, and nobody waits for them."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from server.core import Phase, Request
from server.engine.core import EngineCore
from server.engine.gpu.prompt_graphs import PromptGraphs
from tests.engine.tiny import request, run
from tests.gpu.small import Engines, gpu, prompts

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")

LENGTH = 12
SLEEP_CYCLES = 120_000_000
"""About 0.06 s: many times what the host needs for a step."""


def prompt_graphs(core: EngineCore) -> PromptGraphs:
    return gpu(core).executor.prompts


def never(*_: Any) -> Any:
    raise AssertionError("a chunk ran eagerly")


def batches() -> list[list[Request]]:
    """One prompt, then two, up to eight; short ones, ones of several tiles, and all at once."""
    wanted = [(count, 8, 40) for count in range(1, 9)] + [(3, 100, 300), (8, 1, 3), (8, 20, 200)]
    return [
        [request(f"{i}-{j}", prompt, LENGTH) for j, prompt in enumerate(prompts(count, 30 + i, low, high))]
        for i, (count, low, high) in enumerate(wanted)
    ]


def test_tiers_are_measured_and_captured(engines: Engines) -> None:
    """Four layers take the host longer to launch than the device needs for a few tokens."""
    core = engines.get("none")
    found = prompt_graphs(core)
    assert found.tiers and found.tiers == found.candidates[: len(found.tiers)]
    stats, size = gpu(core).executor.graphs.stats, gpu(core).shape.block_size
    assert stats.num_graphs > len(found.tiers) and stats.memory_bytes > 0
    assert prompt_graphs(engines.get("none", cuda_graphs=False)).tiers == ()
    assert all(bool(pool[:size].isfinite().all()) for pool in gpu(core).pools)


@pytest.mark.parametrize("drafter", ["none", "suffix", "small-lm", "eagle3"])
def test_graphs_and_ragged_chunks_agree(engines: Engines, drafter: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Float32: padding changes the tiles, and so the rounding."""
    captured = engines.get(drafter, 3, dtype="float32", max_num_batched_tokens=256)
    found = prompt_graphs(captured)
    if found.tiers[-1:] != found.candidates[-1:]:  # a slow device: whatever is measured, this is about the answers
        found.tiers = found.candidates
        gpu(captured).executor.capture()
    with monkeypatch.context() as patched:
        patched.setattr(found, "tiers", ())
        expected = [dict(run(captured, batch)) for batch in batches()]
    monkeypatch.setattr(found, "_run_eagerly", never)
    for batch, answers in zip(batches(), expected, strict=True):
        assert dict(run(captured, batch)) == answers
    assert captured.stats().num_graph_misses == 0


@pytest.mark.parametrize("drafter", ["none", "suffix", "eagle3"])
def test_chunks_and_prefix_hits(engines: Engines, drafter: str, monkeypatch: pytest.MonkeyPatch) -> None:
    batch = [request(f"r{i}", prompt, LENGTH) for i, prompt in enumerate(prompts(6, 40, 20, 200))]
    whole = engines.get(drafter, 3, dtype="float32", max_num_batched_tokens=2048)
    with monkeypatch.context() as patched:
        patched.setattr(prompt_graphs(whole), "tiers", ())
        expected = dict(run(whole, batch))
    core = engines.get(drafter, 3, dtype="float32", max_num_batched_tokens=40, prefix_cache=True)
    monkeypatch.setattr(prompt_graphs(core), "_run_eagerly", never)
    for _ in range(2):
        assert dict(run(core, batch)) == expected
    assert core.stats().num_cached_tokens > 0 and core.stats().num_graph_misses == 0


@pytest.mark.parametrize("drafter", ["none", "suffix", "eagle3"])
def test_launching_a_prompt_waits_for_nothing(engines: Engines, drafter: str, monkeypatch: pytest.MonkeyPatch) -> None:
    core = engines.get(drafter)
    batch = [request(f"r{i}", prompt, 3) for i, prompt in enumerate(prompts(5, 50))]
    run(core, batch)
    waited: list[bool] = []
    launch = core.runner.launch

    def asleep(plan: Any, sequences: Any) -> Any:
        if plan.phase is not Phase.PREFILL:
            return launch(plan, sequences)
        torch.cuda.synchronize()
        busy = torch.cuda.Event()
        torch.cuda._sleep(SLEEP_CYCLES)
        busy.record()
        launched = launch(plan, sequences)
        waited.append(busy.query())
        return launched

    monkeypatch.setattr(core.runner, "launch", asleep)
    monkeypatch.setattr(prompt_graphs(core), "_run_eagerly", never)
    run(core, batch)
    assert waited and not any(waited), "the launch waited for work that was queued before it"
