from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch

from server.bench import drive
from server.bench.options import Load
from server.bench.report import BenchError
from server.core import FinishReason, Request, StepOutput


class ScriptedCore:
    """Says what it is told, one entry a step; counts what it is asked."""

    def __init__(self, script: list[list[StepOutput]], refusal: StepOutput | None = None) -> None:
        self.script, self.refusal = list(script), refusal
        self.requests: list[Request] = []
        self.asked: list[str] = []

    def submit(self, request: Request) -> StepOutput | None:
        self.requests.append(request)
        return self.refusal

    @property
    def has_work(self) -> bool:
        self.asked.append("has_work")
        return bool(self.script)

    def step(self) -> list[StepOutput]:
        self.asked.append("step")
        return self.script.pop(0)

    def check_integrity(self) -> None:
        self.asked.append("integrity")


def bench_of(core: ScriptedCore) -> Any:
    return SimpleNamespace(core=core, info=SimpleNamespace(vocab_size=50), device=torch.device("cpu"))


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> None:
    """One second passes from each look at the clock to the next."""
    ticks = iter(range(1000))
    monkeypatch.setattr("server.bench.drive.time", SimpleNamespace(perf_counter=lambda: float(next(ticks))))


def out(*token_ids: int, error: str | None = None) -> StepOutput:
    return StepOutput("r", list(token_ids), error=error, finish_reason=FinishReason.ERROR if error else None)


@pytest.mark.usefixtures("clock")
def test_time_ends_with_the_last_output_even_if_the_engine_goes_on() -> None:
    """As on a GPU: outputs come one step late, and the last step has nothing to say."""
    core = ScriptedCore([[], [out(1), out(1)], [out(2), out(2)], [out(3), out(3)], []])
    run = drive.run(bench_of(core), Load(2, 4, 3), seed=1)
    assert (run.first_s, run.seconds) == (2.0, 4.0)
    assert run.step_s == [1.0, 1.0]
    assert (run.num_tokens, run.tokens_a_step, run.num_verify_steps) == (6, 1.0, 2.0)


@pytest.mark.usefixtures("clock")
def test_tokens_by_step_do_not_count_the_prompts_own() -> None:
    core = ScriptedCore([[out(1)], [out(1)], [out(1, 2, 3), out(1, 2, 3)], [out(1, 2)], [out(1, 2)]])
    run = drive.run(bench_of(core), Load(2, 4, 6), seed=1)
    assert (run.num_tokens, run.tokens_a_step, run.num_verify_steps) == (12, 2.5, 2.0)


def test_what_is_sent() -> None:
    core = ScriptedCore([[out(1, 2)] * 3])
    drive.run(bench_of(core), Load(3, 7, 2), seed=1)
    prompts = [request.prompt_ids for request in core.requests]
    assert [len(ids) for ids in prompts] == [7, 7, 7]
    assert all(0 <= t < 50 for ids in prompts for t in ids) and prompts[0] != prompts[1]
    assert all(r.ignore_eos and r.sampling.greedy and r.max_tokens == 2 for r in core.requests)
    assert len({request.request_id for request in core.requests}) == 3
    assert prompts != [r.prompt_ids for r in drive.make_requests(Load(3, 7, 2), 50, seed=2)]
    assert prompts == [r.prompt_ids for r in drive.make_requests(Load(3, 7, 2), 50, seed=1)]


def test_the_engine_is_asked_for_nothing_but_its_steps() -> None:
    """Whatever else ran between two steps would be taken for the engine's time."""
    core = ScriptedCore([[out(1)], [out(2)], [out(3)]])
    drive.run(bench_of(core), Load(1, 1, 3), seed=1)
    assert core.asked == ["has_work", "step"] * 3 + ["has_work", "integrity"]


@pytest.mark.parametrize(
    ("core", "message"),
    [
        (ScriptedCore([], refusal=out(error="no room")), "load 1x1/3: no room"),
        (ScriptedCore([[out(1)], [out(error="broken logits")]]), "load 1x1/3: broken logits"),
        (ScriptedCore([[out(1)], [out(2)]]), "2 tokens came out instead of 3"),
    ],
)
def test_a_load_that_fails(core: ScriptedCore, message: str) -> None:
    with pytest.raises(BenchError, match=message):
        drive.run(bench_of(core), Load(1, 1, 3), seed=1)
