"""Requests of slow readers step aside and come back: the answer is the same, and nothing leaks meanwhile."""

from __future__ import annotations

import random
from typing import Any

import pytest

from server.core import Request, SamplingParams, StepOutput
from server.engine.core import EngineCore
from tests.engine.tiny import Answers, Scripted, engine, prompts, request, run

LENGTH = 20


def crowd() -> list[Request]:
    """Greedy, seeded, penalised; with a least length, scored prompts, tenants."""
    made = []
    for i, prompt in enumerate(prompts(8, seed=11, low=4, high=30)):
        sampling = [
            SamplingParams(temperature=0.0),
            SamplingParams(temperature=0.9, seed=i),
            SamplingParams(temperature=0.9, seed=i, top_p=0.9, frequency_penalty=0.4, logprobs=1),
        ][i % 3]
        fields: dict[str, Any] = {"ignore_eos": i % 2 == 0, "min_tokens": 5, "tenant": "ab"[i % 2]}
        fields["prompt_logprobs"] = 2 if i % 4 == 1 else None
        made.append(request(f"r{i}", prompt, LENGTH, sampling=sampling, **fields))
    return made


def told(outputs: list[StepOutput]) -> dict[str, list[Any]]:
    """All that clients are told, by request, however it was cut into outputs."""
    found: dict[str, list[Any]] = {}
    for o in outputs:
        entry = found.setdefault(o.request_id, [[], [], None, None])
        entry[0] += o.token_ids
        entry[1] += o.logprobs or []
        entry[2] = o.prompt_logprobs if o.prompt_logprobs is not None else entry[2]
        entry[3] = o.finish_reason or entry[3]
    return found


@pytest.fixture(scope="module")
def alone(model: Any) -> dict[str, list[Any]]:
    return told([o for req in crowd() for o in run(engine(model, max_num_seqs=1), [req]).outputs])


def run_with_holds(core: EngineCore, rng: random.Random) -> list[StepOutput]:
    """Holds and resumes at random moments, and everything at last."""
    outputs: list[StepOutput] = []
    for req in crowd():
        assert core.submit(req) is None
    held: set[str] = set()
    num_holds = 0
    while core.scheduler.by_id:
        for name in sorted(core.scheduler.by_id):
            if rng.random() < (0.4 if name in held else 0.15):
                (core.resume if name in held else core.hold)(name)
                num_holds += name not in held
                held ^= {name}
                core.check_integrity()
        held &= set(core.scheduler.by_id)
        assert core.stats().num_held == len(held)
        before = len(outputs)
        outputs += core.step()
        core.check_integrity()
        assert not held & {o.request_id for o in outputs[before:]}, "who is held is not served"
    assert num_holds > 10
    assert core.stats().kv_blocks_used == core.stats().num_held == 0
    return outputs


@pytest.mark.parametrize("ragged", [True, False])
@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("drafter", ["none", "suffix", "ngram", "small-lm", "hybrid"])
def test_a_held_request_says_what_it_would_have_said(
    model: Any, other_model: Any, alone: Any, drafter: str, seed: int, ragged: bool
) -> None:
    core = engine(model, drafter, 3, draft_model=other_model, num_blocks=40, max_num_seqs=4, budget=7, ragged=ragged)
    found = told(run_with_holds(core, random.Random(seed)))
    if ragged:
        assert found == alone
    else:  # a padded batch sums in another order
        assert {name: (tokens, end) for name, (tokens, _, _, end) in found.items()} == {
            name: (tokens, end) for name, (tokens, _, _, end) in alone.items()
        }
        for name, (_, logprobs, prompt_logprobs, _) in alone.items():
            for mine, theirs in zip((logprobs, prompt_logprobs or []), found[name][1:3], strict=True):
                assert [e.logprob for e in mine] == pytest.approx([e.logprob for e in theirs or []], abs=1e-4)


@pytest.mark.parametrize("num_steps", [0, 1, 2, 3, 5])
def test_held_ones_own_nothing_and_are_no_work(model: Any, greedy: Any, num_steps: int) -> None:
    """Waiting, in the middle of the prompt, decoding."""
    drafter = Scripted(lambda tokens, k: tokens[:k])
    core = engine(model, drafter, 3, budget=6)
    prompt = prompts(1, seed=1, low=14, high=15)[0]
    assert core.submit(request("r", prompt)) is None
    outputs = [o for _ in range(num_steps) for o in core.step()]
    for _ in range(2):
        core.hold("r")
        core.check_integrity()
        stats = core.stats()
        assert (stats.num_held, stats.num_running, stats.num_waiting, stats.num_waiting_tokens) == (1, 0, 0, 0)
        assert stats.kv_blocks_used == 0
        assert not drafter.tokens
        assert not core.has_work
        assert core.step() == []
    core.resume("r")
    assert (core.stats().num_held, core.stats().num_waiting) == (0, 1)
    core.resume("r")
    outputs += run(core, []).outputs
    assert Answers(outputs)["r"] == greedy(prompt, 24)


def test_its_place_goes_to_others(model: Any, greedy: Any) -> None:
    core = engine(model, max_num_seqs=1)
    first, second = prompts(2)
    core.submit(request("a", first))
    core.submit(request("b", second))
    outputs = core.step() + core.step()
    core.hold("a")
    while core.has_work:
        outputs += core.step()
    assert Answers(outputs)["b"] == greedy(second, 24)
    core.resume("a")
    outputs += run(core, []).outputs
    assert Answers(outputs)["a"] == greedy(first, 24)


def test_it_comes_back_before_the_others_of_its_tenant(model: Any) -> None:
    core = engine(model, max_num_seqs=1)
    for name in "abc":
        core.submit(request(name, [5, 6], 4))
    core.hold("c")
    core.resume("c")
    assert [s.request.request_id for s in core.scheduler.waiting] == ["c", "a", "b"]


@pytest.mark.parametrize("num_steps", [0, 1, 4])
def test_an_abort_ends_a_held_one(model: Any, num_steps: int) -> None:
    core = engine(model, "suffix", 3, budget=6)
    core.submit(request("r", prompts(1, low=14, high=15)[0]))
    for _ in range(num_steps):
        core.step()
    core.hold("r")
    core.abort("r")
    core.check_integrity()
    core.resume("r")
    assert not core.has_work
    assert core.stats().num_held == 0
    assert len(run(core, [request("r", [5], 3)])["r"]) == 3, "the id is free again"


def test_a_held_id_is_in_use_and_unknown_ones_are_ignored(model: Any) -> None:
    core = engine(model)
    core.submit(request("r", [5]))
    core.hold("r")
    refused = core.submit(request("r", [5]))
    assert refused is not None and "in use" in str(refused.error)
    for name in ("nobody", ""):
        core.hold(name)
        core.resume(name)
    core.check_integrity()
    assert core.stats().num_held == 1
    core.abort("r")


def test_integrity_looks_at_held_ones(model: Any) -> None:
    core = engine(model)
    core.submit(request("r", [5]))
    core.hold("r")
    seq = core.scheduler.by_id["r"]
    seq.blocks.append(3)
    with pytest.raises(AssertionError, match="r waits but owns"):
        core.check_integrity()
    seq.blocks.clear()
    core.scheduler.waiting.append(seq)
    with pytest.raises(AssertionError, match="more than one of them"):
        core.check_integrity()
