"""What sequences owe each other: siblings share a prompt's blocks, and drafts take nothing from anybody."""

from __future__ import annotations

from typing import Any

import pytest

from server.core import SpeculationParams
from tests.engine.tiny import BLOCK_SIZE, Scripted, engine, prompts, request, run

OFF = SpeculationParams(enabled=False)


def test_choices_that_arrive_together_compute_their_prompt_once(model: Any, greedy: Any) -> None:
    prompt = prompts(1, low=20, high=21)[0]
    shared = (len(prompt) - 1) // BLOCK_SIZE * BLOCK_SIZE
    core = engine(model, budget=8)
    answers = run(core, [request(str(i), prompt, 8) for i in range(4)])
    assert all(answers[str(i)] == greedy(prompt, 8) for i in range(4))
    assert core.stats().num_cached_tokens == 3 * shared
    assert core.stats().num_prefill_tokens <= len(prompt) + 3 * (len(prompt) - shared)


def test_nobody_waits_for_a_prompt_that_only_begins_alike(model: Any) -> None:
    first = prompts(1, low=20, high=21)[0]
    other = [first[0], *[(t + 1) % 60 + 3 for t in first[1:]]]
    core = engine(model, budget=64)
    for name, prompt in (("a", first), ("b", other)):
        assert core.submit(request(name, prompt, 4)) is None
    core.step()
    assert len(core.scheduler.running) == 2


@pytest.mark.parametrize("ragged", [True, False])
def test_rejected_drafts_cost_nobody_his_place(model: Any, greedy: Any, ragged: bool) -> None:
    """As small a pool as plain decoding can live in without preemption: the first ends before the second needs more.

    The first does not draft, so what the second holds for its drafts is what the first lacks.
    """
    first, second = prompts(2, low=8, high=9)
    together = 2 * -(-(len(first) + 12) // BLOCK_SIZE)
    for drafter in ("none", Scripted(lambda tokens, k: [(tokens[-1] + 1 + i) % 64 for i in range(k)])):
        core = engine(model, drafter, 7, num_blocks=1 + together, prefix_cache=False, ragged=ragged)
        answers = run(core, [request("a", first, 12, speculation=OFF), request("b", second, 20)])
        assert (answers["a"], answers["b"]) == (greedy(first, 12), greedy(second, 20))
        assert core.stats().num_preemptions == 0
