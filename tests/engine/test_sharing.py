"""What sequences owe each other: siblings share a prompt's blocks, and drafts take nothing from anybody."""

from __future__ import annotations

from typing import Any

import pytest

from tests.engine.tiny import BLOCK_SIZE, Scripted, engine, prompts, request, run


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
    """As small a pool as plain decoding can live in without preemption: drafting must not need more."""
    several = prompts(4, low=8, high=9)
    need = -(-(8 + 20) // BLOCK_SIZE)
    for drafter in ("none", Scripted(lambda tokens, k: [(tokens[-1] + 1 + i) % 64 for i in range(k)])):
        core = engine(model, drafter, 7, num_blocks=1 + 4 * need, prefix_cache=False, ragged=ragged)
        answers = run(core, [request(str(i), prompt, 20) for i, prompt in enumerate(several)])
        assert [answers[str(i)] for i in range(4)] == [greedy(prompt, 20) for prompt in several]
        assert core.stats().num_preemptions == 0
