"""Greedy output is transformers', whatever drafts, however scheduled."""

from __future__ import annotations

from typing import Any

import pytest

from server.core import FinishReason
from tests.engine.tiny import Scripted, engine, prompts, request, run

LENGTH = 24
DRAFTERS = ("ngram", "suffix", "small-lm", "same-lm", "hybrid", "same-hybrid")


def options(name: str, model: Any, other_model: Any) -> dict[str, Any]:
    if name.endswith("hybrid"):
        return {"drafter": "hybrid", "draft_model": model if name == "same-hybrid" else other_model}
    if name.endswith("-lm"):
        return {"drafter": "small-lm", "draft_model": model if name == "same-lm" else other_model}
    return {"drafter": name}


def check(core: Any, batch: list[list[int]], greedy: Any, length: int = LENGTH) -> Any:
    answers = run(core, [request(f"r{i}", prompt, length) for i, prompt in enumerate(batch)])
    for i, prompt in enumerate(batch):
        assert answers[f"r{i}"] == greedy(prompt, length), f"request {i}"
    assert set(answers.reasons.values()) == {FinishReason.LENGTH}
    return answers


@pytest.mark.parametrize("ragged", [True, False])
def test_plain_decoding_alone_and_together(model: Any, greedy: Any, ragged: bool) -> None:
    batch = prompts(16)
    check(engine(model, ragged=ragged), batch, greedy)
    core = engine(model, max_num_seqs=1, ragged=ragged)
    check(core, batch[:3], greedy)


@pytest.mark.parametrize("ragged", [True, False])
@pytest.mark.parametrize("k", [1, 3, 5, 7])
@pytest.mark.parametrize("drafter", DRAFTERS)
def test_a_batch_of_16_with_drafts(
    model: Any, other_model: Any, greedy: Any, drafter: str, k: int, ragged: bool
) -> None:
    core = engine(model, k=k, ragged=ragged, **options(drafter, model, other_model))
    answers = check(core, prompts(16), greedy)
    assert answers.num_drafted > 0
    if drafter == "same-lm":
        assert answers.num_accepted == answers.num_drafted
    elif drafter != "small-lm":
        assert 0 < answers.num_accepted < answers.num_drafted


@pytest.mark.parametrize("drafter", DRAFTERS)
def test_alone_with_drafts(model: Any, other_model: Any, greedy: Any, drafter: str) -> None:
    core = engine(model, k=5, max_num_seqs=1, **options(drafter, model, other_model))
    check(core, prompts(3), greedy)


@pytest.mark.parametrize("budget", [1, 2, 3, 4, 5, 8])
@pytest.mark.parametrize("drafter", ["none", "suffix", "same-lm", "same-hybrid"])
def test_chunked_prefill(model: Any, other_model: Any, greedy: Any, drafter: str, budget: int) -> None:
    """Budgets around the block size and around k + 1 = 4."""
    core = engine(model, k=3, budget=budget, max_num_seqs=4, **options(drafter, model, other_model))
    check(core, prompts(6), greedy)


@pytest.mark.parametrize("ragged", [True, False])
@pytest.mark.parametrize("drafter", ["none", *DRAFTERS])
def test_forced_preemption(model: Any, other_model: Any, greedy: Any, drafter: str, ragged: bool) -> None:
    core = engine(model, k=3, num_blocks=23, max_num_seqs=8, ragged=ragged, **options(drafter, model, other_model))
    check(core, prompts(10), greedy)
    assert core.stats().num_preemptions > 0


@pytest.mark.parametrize("drafter", ["none", *DRAFTERS])
@pytest.mark.parametrize("length", [8, 9, 11, 12])
def test_prefix_hits(model: Any, other_model: Any, greedy: Any, drafter: str, length: int) -> None:
    """The same prompt again, and one that goes another way: ends on, before and behind a block's edge."""
    core = engine(model, k=3, **options(drafter, model, other_model))
    first = prompts(1, low=20, high=21)[0][:length]
    forked = [*first[:6], *prompts(1, seed=5)[0]]
    check(core, [first], greedy)
    answers = check(core, [first, forked], greedy)
    cached = {o.request_id: o.num_cached for o in answers.outputs if o.num_cached is not None}
    assert cached == {"r0": (length - 1) // 4 * 4, "r1": 4}
    assert core.stats().num_cached_tokens == sum(cached.values())


def test_an_answer_is_a_prefix_of_the_next_turn(model: Any, greedy: Any) -> None:
    core = engine(model, "suffix", k=7)
    prompt = prompts(1)[0]
    answer = run(core, [request("first", prompt, 20)])["first"]
    follow_up = [*prompt, *answer, 7, 9, 11]
    check(core, [follow_up], greedy, 16)
    assert core.stats().num_cached_tokens >= len(prompt) + 12


def test_requests_that_come_one_after_another(model: Any, greedy: Any) -> None:
    """Slots change hands while others decode: nothing of the last owner may show."""
    batch = prompts(12, seed=3)
    lengths = [3 + i % 7 for i in range(12)]
    core = engine(model, "suffix", k=3, max_num_seqs=3, budget=6)
    pending = [request(f"r{i}", p, n) for i, (p, n) in enumerate(zip(batch, lengths, strict=True))]
    found: dict[str, list[int]] = {}
    while pending or core.has_work:
        if pending:
            core.submit(pending.pop(0))
        for output in core.step():
            found.setdefault(output.request_id, []).extend(output.token_ids)
        core.check_integrity()
    assert found == {f"r{i}": greedy(p, n) for i, (p, n) in enumerate(zip(batch, lengths, strict=True))}


# -- adversaries -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("ragged", [True, False])
@pytest.mark.parametrize("kind", ["wrong", "right", "alternating", "half", "none", "no classes"])
def test_no_drafter_can_change_the_output(model: Any, greedy: Any, kind: str, ragged: bool) -> None:
    batch = prompts(6)
    known = {tuple(p): [*p, *greedy(p, LENGTH)] for p in batch}

    def truth(tokens: list[int], k: int) -> list[int]:
        whole = next(w for p, w in known.items() if tuple(tokens[: len(p)]) == p)
        return whole[len(tokens) : len(tokens) + k]

    def propose(tokens: list[int], k: int) -> list[int]:
        right = truth(tokens, k)
        wrong = [(t + 1) % 64 for t in right]
        return {
            "wrong": wrong,
            "right": right,
            "no classes": right,
            "alternating": [w if i % 2 else t for i, (t, w) in enumerate(zip(right, wrong, strict=True))],
            "half": right if len(tokens) % 2 else wrong,
            "none": [],
        }[kind]

    drafter = Scripted(propose, classes=kind != "no classes")
    core = engine(model, drafter, k=4, ragged=ragged)
    answers = check(core, batch, greedy)
    assert not drafter.tokens, "every slot was released"
    stats = core.stats()
    assert sum(stats.drafted_per_position) == answers.num_drafted
    assert sum(stats.accepted_per_position) == answers.num_accepted
    if kind == "wrong":
        assert answers.num_accepted == 0
    if kind == "right":
        assert answers.num_accepted == answers.num_drafted
        # 24 = one from the prompt and 23 behind it, five a step.
        assert len([o for o in answers.outputs if o.request_id == "r0"]) == 1 + 5
    if kind == "alternating":
        assert max(stats.accepted_per_position[1:]) == 0
    if kind == "none":
        assert answers.num_drafted == stats.num_draft_steps == 0
