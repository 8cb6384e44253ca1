"""A predicted answer is drafted from: accepted where it is right, without effect on the tokens where it is not."""

from __future__ import annotations

from typing import Any

import pytest

from draft_models.suffix import SuffixDrafter
from server.core import SamplingParams
from tests.engine.tiny import VOCAB_SIZE, Answers, engine, prompts, request, run

LENGTH = 40
RAGGED = pytest.mark.parametrize("ragged", [True, False])


def steps_of(answers: Answers, name: str) -> int:
    """Verify steps: the first output comes from the prompt's last chunk."""
    return sum(o.request_id == name for o in answers.outputs) - 1


def seeded(name: str, prompt: list[int], prediction: list[int], seed: int = 3) -> Any:
    """So hot that the text hardly repeats itself: its own past drafts little."""
    sampling = SamplingParams(temperature=1.5, seed=seed)
    return request(name, prompt, LENGTH, sampling=sampling, prediction_ids=prediction)


@pytest.fixture(scope="module")
def prompt() -> list[int]:
    return prompts(1, seed=8, low=18, high=19)[0]


@pytest.fixture(scope="module")
def answer(model: Any, prompt: list[int]) -> list[int]:
    return run(engine(model), [seeded("r", prompt, [])])["r"]


@RAGGED
@pytest.mark.parametrize("k", [1, 3, 7])
def test_a_right_prediction_is_accepted_nearly_whole(
    model: Any, prompt: list[int], answer: list[int], k: int, ragged: bool
) -> None:
    core = engine(model, "suffix", k, ragged=ragged)
    answers = run(core, [seeded("r", prompt, answer)])
    assert answers["r"] == answer
    assert steps_of(answers, "r") <= -(-(LENGTH - 1) // (k + 1)) + 1
    without = run(engine(model, "suffix", k, ragged=ragged), [seeded("r", prompt, [])])
    assert steps_of(without, "r") > 1.5 * steps_of(answers, "r"), "else it would have been as fast without"


@RAGGED
def test_it_finds_back_after_an_edit(model: Any, prompt: list[int], answer: list[int], ragged: bool) -> None:
    """A token replaced, two dropped, three put in: each costs a few steps, no more."""
    other = (answer[8] + 1) % VOCAB_SIZE
    edited = [*answer[:8], other, *answer[9:16], *answer[18:25], 60, 61, 62, *answer[25:]]
    answers = run(engine(model, "suffix", 7, ragged=ragged), [seeded("r", prompt, edited)])
    assert answers["r"] == answer
    assert steps_of(answers, "r") <= 16
    assert answers.num_accepted >= 24


@RAGGED
@pytest.mark.parametrize("drafter", ["none", "ngram", "suffix", "small-lm", "hybrid"])
@pytest.mark.parametrize("kind", ["wrong", "right", "long", "prompt", "one"])
def test_no_prediction_changes_a_token(
    model: Any,
    other_model: Any,
    greedy: Any,
    prompt: list[int],
    answer: list[int],
    drafter: str,
    kind: str,
    ragged: bool,
) -> None:
    prediction = {
        "wrong": prompts(1, seed=9, low=40, high=41)[0],
        "right": answer,
        "long": answer + prompts(1, seed=9, low=400, high=401)[0],
        "prompt": prompt,
        "one": [answer[0]],
    }[kind]
    core = engine(model, drafter, 5, draft_model=other_model, ragged=ragged)
    plain = request("g", prompt, LENGTH, prediction_ids=prediction)
    answers = run(core, [seeded("r", prompt, prediction), plain, seeded("without", prompt, [])])
    assert answers["r"] == answers["without"] == answer
    assert answers["g"] == greedy(prompt, LENGTH)
    if drafter == "none":
        assert answers.num_drafted == 0


def test_every_token_of_the_vocabulary_may_be_predicted(model: Any, prompt: list[int], answer: list[int]) -> None:
    """Nothing that a prediction holds, its end included, may reach the target as a token that does not exist."""
    everything = list(range(VOCAB_SIZE))
    core = engine(model, "suffix", 7)
    for seed in range(6):
        expected = run(engine(model), [seeded("r", prompt, [], seed)])["r"]
        for prediction in (everything, expected[:5], expected[:1]):
            assert run(core, [seeded("r", prompt, prediction, seed)])["r"] == expected


@pytest.mark.parametrize("bad", [VOCAB_SIZE, -1])
def test_a_token_that_does_not_exist_is_refused(model: Any, prompt: list[int], bad: int) -> None:
    output = engine(model, "suffix").submit(seeded("r", prompt, [5, bad]))
    assert output is not None and f"token id {bad} is out of range" in str(output.error)


@RAGGED
def test_it_is_still_there_after_a_preemption(model: Any, prompt: list[int], answer: list[int], ragged: bool) -> None:
    core = engine(model, "suffix", 7, ragged=ragged)
    assert core.submit(seeded("r", prompt, answer)) is None
    outputs = core.step() + core.step()
    core.scheduler.preempt(core.scheduler.by_id["r"])
    while core.has_work:
        outputs += core.step()
    answers = Answers(outputs)
    assert answers["r"] == answer
    assert len(outputs) <= -(-(LENGTH - 1) // 8) + 3


def test_predictions_have_an_acceptance_class_of_their_own(model: Any, prompt: list[int], answer: list[int]) -> None:
    core = engine(model, "suffix", 7)
    run(core, [seeded("r", prompt, answer)])
    names = core.speculation.acceptance.classes()
    assert {"predicted:1", "predicted:9+"} <= set(names)
    assert core.speculation.acceptance.conditional("predicted:9+", 0) > 0.6


# -- outputs that others may copy from ---------------------------------------------------------------------


def recent(core: Any) -> list[list[int]]:
    store = core.runner.drafter._recent
    return list(store._outputs.values())


def test_only_whole_answers_are_shared(model: Any, prompt: list[int], answer: list[int]) -> None:
    core = engine(model, SuffixDrafter(recent_outputs=8), 3, num_blocks=40, prefix_cache=False)
    run(core, [seeded("r", prompt, prompts(1, seed=9)[0])])
    assert recent(core) == [answer], "all of it, without prompt and prediction"
    core.submit(seeded("aborted", prompt, [], seed=4))
    core.submit(seeded("preempted", prompt, [], seed=5))
    core.submit(seeded("held", prompt, [], seed=6))
    for _ in range(6):
        core.step()
    core.abort("aborted")
    core.hold("held")
    core.scheduler.preempt(core.scheduler.by_id["preempted"])
    core.step()
    assert recent(core) == [answer]
    core.resume("held")
    answers = run(core, [])
    assert len(recent(core)) == 3
    assert all(len(output) == LENGTH for output in recent(core))
    assert set(answers) == {"preempted", "held"}
