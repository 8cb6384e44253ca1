"""Streams, and what counts as emitted by a verify step."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any, cast

import pytest

from benchmarks.engine import build
from benchmarks.text.acceptance import macro, macro_drafted_share, macro_survival, total
from benchmarks.text.closed_loop import Answer, closed_loop
from server.core import Request, SamplingParams
from server.engine.core import EngineCore
from tests.benchmarks.text.scripted import ScriptedEngine

GREEDY = SamplingParams(temperature=0.0)


def feed(*names: str) -> Callable[[], Request | None]:
    requests = iter([Request(name, [1]) for name in names])
    return lambda: next(requests, None)


def engine(scripted: Any) -> EngineCore:
    return cast(EngineCore, scripted)


def test_emitted_tokens_and_steps_by_hand() -> None:
    """One answer: the prompt's token; 3 of 5 drafts and the bonus; none of 2; a stop token that cuts 4 off to 2."""
    script = [([9], 0, 0), ([1, 2, 3, 4], 5, 3), ([5], 2, 0), ([6, 2], 5, 2)]
    answers: list[Answer] = []
    core = ScriptedEngine({"a": script})
    window = closed_loop(engine(core), feed("a"), 1, lambda request, answer: answers.append(answer), drain=True)
    assert (window.num_tokens, window.num_answers) == (8, 1)
    assert answers[0].tokens == [9, 1, 2, 3, 4, 5, 6, 2]
    assert answers[0].verdicts == [(5, 3), (2, 0), (5, 2)]
    t = total(answers)
    assert (t.answers, t.emitted, t.steps) == (1, 7, 3)
    assert t.emitted_per_step == pytest.approx(7 / 3)
    assert t.drafted == [3, 3, 2, 2, 2]
    assert t.reached == [3, 2, 2, 1, 0]
    assert t.accepted == [2, 2, 1, 0, 0]
    assert t.survival() == [2 / 3, 2 / 3, 0.5, 0.0, 0.0]


def test_a_row_of_a_batch_is_a_step_of_its_own() -> None:
    core = ScriptedEngine({"a": [([1], 0, 0), ([1, 2], 1, 1)], "b": [([1], 0, 0), ([1], 1, 0), ([1], 0, 0)]})
    answers: list[Answer] = []
    closed_loop(engine(core), feed("a", "b"), 2, lambda request, answer: answers.append(answer), drain=True)
    t = total(answers)
    assert (t.emitted, t.steps, t.drafted, t.accepted) == (4, 3, [2], [1])


def test_the_mean_is_over_categories() -> None:
    a = total([Answer([1, 2, 3, 4], [(2, 2)])])
    b = total([Answer([1, 2], [(1, 0)]), Answer([1, 2], [(1, 0)])])
    assert macro({"a": a, "b": b, "none": total([])}) == 2.0
    assert macro_survival({"a": a, "b": b, "none": total([])}) == [0.5, 1.0]
    assert macro_drafted_share({"a": a, "b": b, "none": total([])}) == [1.0, 0.5]


def test_what_is_seldom_drafted_is_seen() -> None:
    """All its drafts are accepted, but it drafts in one step of four."""
    t = total([Answer([1] * 6, [(0, 0), (0, 0), (1, 1), (0, 0)])])
    assert t.survival() == [1.0] and t.drafted_share() == [0.25]


def test_streams_stay_busy_until_there_are_no_prompts() -> None:
    short, long = [([1], 0, 0)] * 2, [([1], 0, 0)] * 5
    core = ScriptedEngine({"a": short, "b": long, "c": short, "d": short})
    window = closed_loop(engine(core), feed("a", "b", "c", "d"), 2, drain=True)
    assert (window.num_tokens, window.num_answers, core.most) == (11, 4, 2)
    core = ScriptedEngine({"a": short, "b": long, "c": short})
    window = closed_loop(engine(core), feed("a", "b", "c"), 2, drain=False)
    assert (window.num_tokens, window.num_answers, core.aborted) == (8, 2, ["b"])  # when c ends, a stream has nothing


def test_a_preempted_request_is_an_error() -> None:
    class Preempting(ScriptedEngine):
        def step(self) -> Any:
            self.preemptions += 1
            return super().step()

    with pytest.raises(RuntimeError, match="preempted"):
        closed_loop(engine(Preempting({"a": [([1], 0, 0)]})), feed("a"), 1, drain=True)


def test_a_refused_request_is_an_error(tiny_llama_dir: Path) -> None:
    core = build("none", model=str(tiny_llama_dir), device="cpu", kv_cache_tokens=64, max_num_seqs=1)
    with pytest.raises(RuntimeError, match="the prompt is empty"):
        closed_loop(core, lambda: Request("x", []), 1, drain=True)


@pytest.mark.parametrize("num_streams", [1, 3])
def test_steps_are_those_of_the_engine(tiny_llama_dir: Path, num_streams: int) -> None:
    core = build(
        "ngram",
        model=str(tiny_llama_dir),
        device="cpu",
        prefix_cache=False,
        adaptive=False,
        kv_cache_tokens=800,
        max_num_seqs=4,
        max_draft_tokens=5,
    )
    prompts = [[5, 6, 7, 8] * 6, [40 + i for i in range(40)], [9, 80, 9, 80, 9]]
    pending = [Request(str(i), ids, GREEDY, max_tokens=60, ignore_eos=True) for i, ids in enumerate(prompts)]
    answers: list[Answer] = []
    closed_loop(
        core,
        lambda: pending.pop() if pending else None,
        num_streams,
        lambda request, answer: answers.append(answer),
        drain=True,
    )
    stats, t = core.stats(), total(answers)
    assert t.emitted == 3 * 59
    assert sum(t.accepted) == sum(stats.accepted_per_position) > 0
    assert t.drafted == stats.drafted_per_position
    assert t.steps + sum(t.accepted) == t.emitted  # nothing is cut off: the last tokens are not drafted for
    if num_streams == 1:
        assert t.steps == stats.num_steps - 3  # one step for each prompt
    else:
        assert t.steps > stats.num_steps - 3
