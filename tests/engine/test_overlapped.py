"""The runner that reads each step one step late says what the other one says, whatever happens meanwhile."""

from __future__ import annotations

from typing import Any

import pytest

from server.core import FinishReason, SamplingParams, SpeculationParams
from tests.engine.tiny import Answers, engine, prompts, request, run

LENGTH = 24
DRAFTERS = ("none", "ngram", "suffix")


def late(model: Any, drafter: str = "none", **options: Any) -> Any:
    return engine(model, drafter, overlapped=True, **options)


def check(core: Any, batch: list[list[int]], greedy: Any, length: int = LENGTH) -> Answers:
    answers = run(core, [request(f"r{i}", prompt, length) for i, prompt in enumerate(batch)])
    for i, prompt in enumerate(batch):
        assert answers[f"r{i}"] == greedy(prompt, length), f"request {i}"
    assert set(answers.reasons.values()) == {FinishReason.LENGTH}
    return answers


@pytest.mark.parametrize("k", [1, 3, 7])
@pytest.mark.parametrize("drafter", DRAFTERS)
def test_greedy(model: Any, greedy: Any, drafter: str, k: int) -> None:
    answers = check(late(model, drafter, k=k), prompts(16), greedy)
    if drafter != "none":
        assert 0 < answers.num_accepted < answers.num_drafted
    check(late(model, drafter, k=k, max_num_seqs=1), prompts(2), greedy)


def test_a_suffix_drafter_that_is_told_a_step_late_drafts_as_often(model: Any, greedy: Any) -> None:
    """A token that nobody foresaw does not cost the next step its drafts."""
    batch = prompts(6, seed=3)
    shares = []
    for core in (engine(model, "suffix", k=5), late(model, "suffix", k=5)):
        answers = check(core, batch, greedy, 48)
        drafted = [output.num_drafted > 0 for output in answers.outputs if output.token_ids]
        shares.append(sum(drafted) / len(drafted))
    assert shares[1] > 0.95 * shares[0] > 0.1


@pytest.mark.parametrize("budget", [1, 3, 4, 5, 8])
@pytest.mark.parametrize("drafter", ["none", "suffix"])
def test_chunked_prefill(model: Any, greedy: Any, drafter: str, budget: int) -> None:
    check(late(model, drafter, budget=budget, max_num_seqs=4), prompts(6), greedy)


@pytest.mark.parametrize("drafter", DRAFTERS)
def test_forced_preemption(model: Any, greedy: Any, drafter: str) -> None:
    core = late(model, drafter, num_blocks=23, max_num_seqs=8)
    check(core, prompts(10), greedy)
    assert core.stats().num_preemptions > 0


@pytest.mark.parametrize("length", [8, 9, 11, 12])
def test_prefix_hits(model: Any, greedy: Any, length: int) -> None:
    core = late(model, "suffix")
    first = prompts(1, low=20, high=21)[0][:length]
    for batch in ([first], [first], [[*first[:-1], 5], first]):
        check(core, batch, greedy)
    assert core.stats().num_cached_tokens > 0


@pytest.mark.parametrize("drafter", DRAFTERS)
def test_what_ends_early_costs_a_void_row(model: Any, drafter: str) -> None:
    """Stop tokens are seen one step late: the step that runs meanwhile is nobody's."""
    batch = prompts(12, seed=6)
    ends = list(range(3, 12))

    def requests() -> list[Any]:
        return [
            request(f"r{i}", prompt, LENGTH - i, ignore_eos=False, stop_token_ids=ends[: i % 9])
            for i, prompt in enumerate(batch)
        ]

    expected = run(engine(model, max_num_seqs=4), requests())
    found = run(late(model, drafter, max_num_seqs=4), requests())
    assert dict(found) == dict(expected)
    assert found.reasons == expected.reasons
    assert FinishReason.STOP in found.reasons.values()


@pytest.mark.parametrize("rule", ["coupled", "ratio"])
@pytest.mark.parametrize("drafter", DRAFTERS)
def test_sampled_requests_of_every_class(model: Any, drafter: str, rule: str) -> None:
    kinds: list[SamplingParams] = [
        SamplingParams(temperature=0.0),
        SamplingParams(temperature=0.9, seed=1),
        SamplingParams(temperature=0.9, seed=2, top_p=0.8, top_k=20),
        SamplingParams(temperature=1.1, seed=3, min_p=0.05, frequency_penalty=0.3, repetition_penalty=1.1),
        SamplingParams(temperature=0.7, seed=4, logit_bias={7: 2.0, 9: -5.0}, logprobs=3),
        SamplingParams(temperature=0.0, logprobs=0),
    ]

    def requests() -> list[Any]:
        return [
            request(f"r{i}", prompt, LENGTH, sampling=kinds[i % len(kinds)], min_tokens=(i % 3) * 5, ignore_eos=False)
            for i, prompt in enumerate(prompts(12, seed=3))
        ]

    expected = run(engine(model, rule=rule), requests())
    found = run(late(model, drafter, rule=rule), requests())
    if rule == "coupled" or drafter == "none":
        assert dict(found) == dict(expected)
        logprobs = {o.request_id: o.logprobs for o in expected.outputs}
        for output in found.outputs:
            assert (output.logprobs is None) == (logprobs[output.request_id] is None)
            for entry in output.logprobs or []:
                assert entry.logprob <= 0.0
    assert found.reasons.keys() == expected.reasons.keys()


def test_prompt_log_probabilities(model: Any) -> None:
    def requests() -> list[Any]:
        return [request(f"r{i}", p, 4, prompt_logprobs=i % 3) for i, p in enumerate(prompts(6, low=20, high=40))]

    expected = {o.request_id: o.prompt_logprobs for o in run(engine(model, budget=9), requests()).outputs[::-1]}
    for output in run(late(model, budget=9), requests()).outputs:
        if output.prompt_logprobs is not None:
            mine, theirs = output.prompt_logprobs, expected[output.request_id] or []
            assert [(e.token_id, e.top_ids) for e in mine] == [(e.token_id, e.top_ids) for e in theirs]
            assert [e.logprob for e in mine] == pytest.approx([e.logprob for e in theirs], abs=1e-4)


@pytest.mark.parametrize("drafter", DRAFTERS)
def test_requests_that_vanish_or_pause_while_a_step_runs(model: Any, greedy: Any, drafter: str) -> None:
    core = late(model, drafter, max_num_seqs=4)
    batch = prompts(10, seed=2)
    for i, prompt in enumerate(batch):
        assert core.submit(request(f"r{i}", prompt, LENGTH)) is None
    outputs = []
    for step in range(1000):
        if step in (3, 7):
            core.abort(f"r{step - 3}")
        if step == 5:
            core.hold("r1")
            core.hold("r2")
        if step == 12:
            core.resume("r1")
            core.resume("r2")
        if not core.scheduler.by_id and not core.has_work:
            break
        outputs += core.step()
        core.check_integrity()
    answers = Answers(outputs)
    for i in (1, 2, 3, 5, 6, 7, 8, 9):
        assert answers[f"r{i}"] == greedy(batch[i], LENGTH), f"request {i}"
    assert "r0" not in answers.reasons
    assert core.stats().kv_blocks_used == 0


def test_a_request_bounds_or_forbids_its_drafts(model: Any, greedy: Any) -> None:
    core = late(model, "suffix", k=5)
    wishes = [SpeculationParams(enabled=False), SpeculationParams(max_draft_tokens=1), SpeculationParams()]
    batch = prompts(9, seed=4)
    answers = run(core, [request(f"r{i}", p, LENGTH, speculation=wishes[i % 3]) for i, p in enumerate(batch)])
    for i, prompt in enumerate(batch):
        assert answers[f"r{i}"] == greedy(prompt, LENGTH)
    most = [max((o.num_drafted for o in answers.outputs if o.request_id == f"r{i}"), default=0) for i in range(9)]
    assert [most[i] for i in (0, 3, 6)] == [0, 0, 0]
    assert max(most[i] for i in (1, 4, 7)) == 1
    assert max(most[i] for i in (2, 5, 8)) > 1


def test_one_step_is_always_under_way(model: Any) -> None:
    """Outputs come one step late, and a lone request never runs a row more than it has tokens for."""
    core = late(model)
    core.submit(request("a", [5, 6, 7], 3, ignore_eos=True))
    assert core.step() == []  # its prompt runs
    first = core.step()  # its second token runs
    assert [len(o.token_ids) for o in first] == [1]
    second = core.step()  # its third runs
    assert [len(o.token_ids) for o in second] == [1]
    last = core.step()  # nothing is left to run
    assert [o.finish_reason for o in last] == [FinishReason.LENGTH]
    assert not core.has_work
    assert core.stats().num_steps == 3


def test_a_block_that_changes_hands_within_one_plan(model: Any) -> None:
    """Draft blocks are taken back and given out again while a plan is made: as many blocks as before, but others."""
    core = late(model, "suffix", k=5, num_blocks=80, max_num_seqs=16)
    batch = prompts(30, seed=9)
    expected = run(engine(model), [request(f"r{i}", prompt, 40) for i, prompt in enumerate(batch)])
    assert dict(run(core, [request(f"r{i}", prompt, 40) for i, prompt in enumerate(batch)])) == dict(expected)
    assert core.stats().num_preemptions > 0


def test_more_biases_than_there_was_room_for(model: Any) -> None:
    bias = {t: -0.01 * t for t in range(3, 60)}

    def requests() -> list[Any]:
        sampling = [SamplingParams(temperature=0.0, logit_bias=bias), SamplingParams(temperature=0.0)]
        return [request(f"r{i}", p, 12, sampling=sampling[i % 2]) for i, p in enumerate(prompts(6, seed=8))]

    core = late(model)
    assert dict(run(core, requests())) == dict(run(engine(model), requests()))
