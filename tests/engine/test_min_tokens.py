"""No answer ends before its `min_tokens`, and which tokens come before does not depend on drafts."""

from __future__ import annotations

from typing import Any

import pytest

from server.core import FinishReason, Request, SamplingParams
from tests.engine.tiny import VOCAB_SIZE, Scripted, engine, prompts, request, run, runner_of

LENGTH = 24
EOS = [2, 5, 9, 20, 33, 47]
"""Enough of them that seeded answers end early where they may."""


def crowd() -> list[Request]:
    """Greedy and sampled, with and without a least length, with stop tokens, with everything else."""
    made = []
    for i, prompt in enumerate(prompts(12, seed=6)):
        sampling = [
            SamplingParams(temperature=0.0),
            SamplingParams(temperature=1.0, seed=i),
            SamplingParams(temperature=0.9, seed=i, top_p=0.9, frequency_penalty=0.5, logit_bias={5: 6.0, 11: 3.0}),
        ][i % 3]
        stops = [[], [11, 12, 13], [EOS[0], 40]][i % 3]
        fields: dict[str, Any] = {"sampling": sampling, "stop_token_ids": stops, "ignore_eos": i == 5}
        made.append(request(f"r{i}", prompt, LENGTH, min_tokens=[0, 7, 24, 3][i % 4], **fields))
    return made


def ends_of(req: Request) -> set[int]:
    return set(req.stop_token_ids) | (set() if req.ignore_eos else set(EOS))


@pytest.fixture(scope="module")
def alone(model: Any) -> dict[str, list[int]]:
    answers: dict[str, list[int]] = {}
    for req in crowd():
        answers |= run(engine(model, max_num_seqs=1, eos=EOS), [req])
    return answers


def test_no_answer_ends_early_and_some_would(model: Any, alone: dict[str, list[int]]) -> None:
    for req in crowd():
        answer = alone[req.request_id]
        assert req.min_tokens <= len(answer) <= LENGTH
        assert not set(answer[:-1]) & ends_of(req)
        if len(answer) < LENGTH or answer[-1] in ends_of(req):
            assert answer[-1] in ends_of(req) and len(answer) > req.min_tokens
    free = [request(r.request_id, r.prompt_ids, LENGTH, sampling=r.sampling, stop_token_ids=r.stop_token_ids,
                    ignore_eos=r.ignore_eos) for r in crowd()]  # fmt: skip
    without = run(engine(model, eos=EOS), free)
    assert sum(len(without[r.request_id]) <= r.min_tokens for r in crowd()) >= 4
    for req in crowd():
        both = list(zip(alone[req.request_id], without[req.request_id], strict=False))
        first = next((i for i, (a, b) in enumerate(both) if a != b), len(both))
        if first < len(both):
            assert both[first][1] in ends_of(req), "up to the first end that was withheld the answers are one"


@pytest.mark.parametrize("ragged", [True, False])
@pytest.mark.parametrize("k", [1, 3, 7])
@pytest.mark.parametrize("drafter", ["none", "ngram", "suffix", "small-lm", "same-lm"])
def test_any_drafter_gives_the_same(
    model: Any, other_model: Any, alone: dict[str, list[int]], drafter: str, k: int, ragged: bool
) -> None:
    name = "small-lm" if drafter == "same-lm" else drafter
    draft_model = model if drafter == "same-lm" else other_model
    core = engine(model, name, k, draft_model=draft_model, ragged=ragged, eos=EOS)
    answers = run(core, crowd())
    assert dict(answers) == alone
    if drafter == "same-lm":
        assert answers.num_accepted > 0
    assert not runner_of(core).sampling.early_slots


@pytest.mark.parametrize("ragged", [True, False])
def test_drafts_of_ends_are_rejected_one_by_one(model: Any, alone: dict[str, list[int]], ragged: bool) -> None:
    """A drafter that drafts ends, right tokens and ends again."""
    known = {tuple(r.prompt_ids): [*r.prompt_ids, *alone[r.request_id]] for r in crowd()}

    def propose(tokens: list[int], k: int) -> list[int]:
        whole = next(w for p, w in known.items() if tuple(tokens[: len(p)]) == p)
        right = whole[len(tokens) : len(tokens) + k]
        return [2] * k if len(tokens) % 3 == 0 else [*right[:2], *[5] * k][:k]

    answers = run(engine(model, Scripted(propose), 5, ragged=ragged, eos=EOS), crowd())
    assert dict(answers) == alone
    assert 0 < answers.num_accepted < answers.num_drafted


@pytest.mark.parametrize("rule", ["coupled", "ratio"])
def test_either_rule_withholds_ends(model: Any, other_model: Any, rule: str) -> None:
    answers = run(engine(model, "small-lm", 3, draft_model=other_model, rule=rule, eos=EOS), crowd())
    for req in crowd():
        assert len(answers[req.request_id]) >= req.min_tokens
        assert not set(answers[req.request_id][:-1]) & ends_of(req)


def test_preemption_keeps_the_count(model: Any, alone: dict[str, list[int]]) -> None:
    core = engine(model, "suffix", 5, num_blocks=16, max_num_seqs=8, budget=16, eos=EOS)
    assert dict(run(core, crowd()[::-1])) == alone
    assert core.stats().num_preemptions > 0


def test_steps_look_after_ends_only_as_long_as_they_must(model: Any) -> None:
    core = engine(model, "suffix", 3, eos=EOS)
    core.submit(request("r", prompts(1)[0], LENGTH, min_tokens=9, ignore_eos=False))
    core.step()
    seq = core.scheduler.by_id["r"]
    while core.has_work:
        early = seq.num_emitted < 9
        core.step()
        if core.has_work:
            assert bool(runner_of(core).sampling.early_slots) == early


def test_it_may_end_right_behind(model: Any, greedy: Any) -> None:
    """The token after the last one withheld is free, drafted or not."""
    prompt = prompts(1)[0]
    answer = greedy(prompt, LENGTH)
    first = next(i for i in range(2, LENGTH) if answer.index(answer[i]) == i)
    whole = [*prompt, *answer]
    for drafter in ("none", Scripted(lambda tokens, k: whole[len(tokens) : len(tokens) + k])):
        core = engine(model, drafter, 7)
        req = request("r", prompt, LENGTH, min_tokens=first, stop_token_ids=[answer[first]])
        answers = run(core, [req])
        assert answers["r"] == answer[: first + 1]
        assert answers.reasons["r"] is FinishReason.STOP


def test_a_bias_can_not_force_an_end(model: Any) -> None:
    sampling = SamplingParams(temperature=0.0, logit_bias={2: 100.0})
    answers = run(engine(model), [request("r", [5], 9, sampling=sampling, min_tokens=6, ignore_eos=False)])
    assert len(answers["r"]) == 7 and answers["r"][-1] == 2


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"min_tokens": -1}, "min_tokens: -1 is not valid; use 0 to max_tokens (8)"),
        ({"min_tokens": 9}, "min_tokens: 9 is not valid"),
        ({"min_tokens": 1, "stop_token_ids": list(range(VOCAB_SIZE))}, "each of the 64 tokens ends the answer"),
        ({"min_tokens": 1, "stop_token_ids": [t for t in range(64) if t != 2], "ignore_eos": False}, "each of the 64"),
        ({"stop_token_ids": [64]}, "token id 64 is out of range"),
        ({"stop_token_ids": [-1]}, "token id -1 is out of range"),
    ],
)
def test_what_can_not_be_is_refused(model: Any, fields: dict[str, Any], message: str) -> None:
    output = engine(model).submit(request("r", [5], 8, **fields))
    assert output is not None and message in str(output.error)


def test_all_but_one_token_may_end_it(model: Any) -> None:
    fields = {"stop_token_ids": [t for t in range(64) if t not in (2, 7)], "ignore_eos": False}
    assert run(engine(model), [request("r", [5], 8, min_tokens=3, **fields)])["r"][:3] == [7, 7, 7]
    core = engine(model, eos=[2, 99])  # some configurations name ends that the model does not have
    assert run(core, [request("r", [5], 8, min_tokens=3, **fields)])["r"][:3] == [7, 7, 7]
