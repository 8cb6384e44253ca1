"""While drafting is paused nothing of the drafter runs; what brings it back is cheap; the text is the same."""

from __future__ import annotations

import json
import re
import time
from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from draft_models.eagle3 import Eagle3Drafter
from draft_models.eagle3_chain import ChainShape, TorchSampler
from draft_models.eagle3_config import config_for
from draft_models.eagle3_network import Eagle3Network
from draft_models.eagle3_weights import random_weights
from draft_models.small_lm_device import SmallLMDeviceDrafter
from server.core import Phase
from server.engine.core import EngineCore
from server.engine.costs import _follow_timer
from server.engine.gpu.runner import GpuRunner
from server.engine.result import StepResult
from server.engine.speculation import Speculation
from server.models.loader import load_model
from server.models.paged_forward import TorchForward
from server.spec.cost_table import CostGrid, CostTable
from tests.engine.tiny import BLOCK_SIZE, engine, prompts, request, run, save_loopy_llama

K, NUM_SEQS, NUM_BLOCKS = 3, 4, 400
Calls = Counter[str]
ONES = np.ones((1, 2, 1))


class FixedCosts(CostTable):
    """Nothing is learned of steps, which take no time here."""

    def observe(self, num_rows: int, num_tokens: int, context: float, ms: float) -> None:
        pass


def costs(one: float, many: float, crowd: int = NUM_SEQS) -> FixedCosts:
    """A step without drafts costs 1; with K of them `one` for a single row, `many` for `crowd` rows and more."""
    grid = CostGrid((1, crowd), (0, 1, K), (16,))
    steps = [[[1.0], [1.0 + (dear - 1.0) / K], [dear]] for dear in (one, many)]
    return FixedCosts(grid, np.array(steps))


@pytest.fixture(scope="module")
def deep_model(tmp_path_factory: pytest.TempPathFactory) -> Any:
    path: Path = save_loopy_llama(tmp_path_factory.mktemp("deep"), 0, 4)
    raw = json.loads((path / "config.json").read_text())
    return load_model(path, raw, torch.device("cpu"), torch.float32, 256)


def overlapped(model: Any, drafter: str, table: CostTable, max_model_len: int = 220) -> EngineCore:
    """`eagle3` is a random head, `small-lm` the target itself: useless, and as good as can be."""
    chain, sampler = ChainShape(NUM_SEQS + 1, NUM_BLOCKS, BLOCK_SIZE, K), TorchSampler(model.vocab_size, "coupled")
    made: Any
    if drafter == "eagle3":
        head = config_for(model.config, 32)
        network = Eagle3Network(head, random_weights(head, 0), model.embedding, max_model_len + 20)
        made = Eagle3Drafter(network, chain, sampler)
    else:
        made = SmallLMDeviceDrafter(TorchForward(model), model.kv_layers, torch.float32, model.device, chain, sampler)
    core = engine(
        model, made, K, max_num_seqs=NUM_SEQS, num_blocks=NUM_BLOCKS, max_model_len=max_model_len, overlapped=True
    )
    runner = core.runner
    assert isinstance(runner, GpuRunner)
    runner.executor.k_tiers = (0, 1, K)
    core.speculation = Speculation(table, K, False)
    core.speculation.tiers = (1, K)
    return core


def watch(core: EngineCore, monkeypatch: pytest.MonkeyPatch) -> Calls:
    """Counts what is asked of the drafter in steps, and how often the network leaves features."""
    calls: Calls = Counter()
    runner: Any = core.runner

    def counted(name: str, call: Callable[..., Any]) -> Callable[..., Any]:
        def wrapper(*args: Any, **kwargs: Any) -> Any:
            calls[name] += 1
            return call(*args, **kwargs)

        return wrapper

    for name in ("draft", "after_verify", "prefill_chunk"):
        monkeypatch.setattr(runner.drafter, name, counted(name, getattr(runner.drafter, name)))
    forward = runner.program.forward

    def noted(*args: Any) -> Any:
        calls["features"] += bool(args[6])
        calls["forward"] += 1
        return forward(*args)

    monkeypatch.setattr(runner.program, "forward", noted)
    return calls


@pytest.mark.parametrize("drafter", ["eagle3", "small-lm"])
def test_nothing_of_the_drafter_runs(deep_model: Any, drafter: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Drafts cost a hundred steps: they never pay, and no probe is affordable."""
    core = overlapped(deep_model, drafter, costs(100.0, 100.0))
    calls = watch(core, monkeypatch)
    batch = [request(f"r{i}", prompt, 30, ignore_eos=True) for i, prompt in enumerate(prompts(6, low=20, high=60))]
    found = run(core, batch)
    assert found == run(engine(deep_model), batch)
    assert calls.pop("forward") > 30
    assert not +calls
    assert core.speculation.paused and core.stats().speculation_paused


def test_a_useless_head_is_paused_and_serving_goes_on(deep_model: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Drafts are cheap, but none is ever accepted: they are tried, given up, and seldom tried again."""
    core = overlapped(deep_model, "eagle3", costs(1.2, 1.5))
    calls = watch(core, monkeypatch)
    batch = [request(f"r{i}", prompt, 180, ignore_eos=True) for i, prompt in enumerate(prompts(4))]
    found = run(core, batch)
    assert found == run(engine(deep_model, max_model_len=220), batch)
    assert found.num_accepted < 0.1 * found.num_drafted
    assert core.stats().speculation_paused
    early = calls["draft"]
    assert 0 < early < 40
    calls.clear()
    later = run(core, [request(f"s{i}", prompt, 180, ignore_eos=True) for i, prompt in enumerate(prompts(4, 1))])
    assert later.num_drafted > 0, "it is tried again"
    assert calls["prefill_chunk"] == 0
    assert calls["draft"] <= 8
    assert (
        calls["draft"] < calls["after_verify"] == calls["features"] <= calls["draft"] * (K + 2) < calls["forward"] / 3
    )


@pytest.mark.parametrize("drafter", ["eagle3", "small-lm"])
def test_drafts_come_back_when_the_crowd_has_gone(
    deep_model: Any, drafter: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Four rows do not pay, one does: prompts are read again by then, and the long one drafts in the end."""
    core = overlapped(deep_model, drafter, costs(1.01, 100.0))
    calls = watch(core, monkeypatch)
    crowd = [request(f"r{i}", prompt, 30, ignore_eos=True) for i, prompt in enumerate(prompts(4, low=20, high=24))]
    long = request("long", prompts(1, 5)[0], 100, ignore_eos=True)
    found = run(core, [*crowd[1:], long])
    assert found == run(engine(deep_model), [*crowd[1:], long])
    if drafter == "small-lm":
        assert found.num_accepted > 0.8 * found.num_drafted > 30
    assert calls["draft"] > 5
    calls.clear()
    run(core, [request("alone", prompts(1, 7)[0], 10, ignore_eos=True)])
    assert calls["prefill_chunk"] > 0


def test_what_is_told_of_a_pause(deep_model: Any) -> None:
    core = overlapped(deep_model, "eagle3", costs(100.0, 100.0))
    assert core.stats().predicted_speedup is None
    before = time.time()
    run(core, [request("r", prompts(1)[0], 30, ignore_eos=True)])
    stats = core.stats()
    assert stats.speculation_paused and stats.num_speculation_pauses == 1
    assert stats.speculation_paused_since is not None and before <= stats.speculation_paused_since <= time.time()
    assert stats.speculation_pause_reason is not None
    told = r"at best k = 1: 1\.\d\d tokens a step in 34\.00 times the time, batch 1"
    assert re.fullmatch(told, stats.speculation_pause_reason)
    assert stats.predicted_speedup == 1.0
    assert stats.realised_speedup is None, "steps take no time here"


def test_speed_ups_of_an_engine_that_measures(deep_model: Any) -> None:
    """Every step takes as long, with drafts or without: the speed-up is the number of tokens a step."""
    core = engine(
        deep_model, "small-lm", K, draft_model=deep_model, costs=FixedCosts(CostGrid((1,), (0, K), (16,)), ONES)
    )
    speculation = core.speculation
    took = speculation.report.took
    speculation.report.took = lambda ms, plain_ms: took(1.0, plain_ms)  # type: ignore[method-assign]
    found = run(core, [request("r", prompts(1)[0], 41, ignore_eos=True)])
    stats = core.stats()
    assert len(found["r"]) == 41, "the prompt's step brings the first"
    assert stats.verify_plain_s == pytest.approx(0.040)
    assert stats.realised_speedup == pytest.approx(stats.verify_plain_s / stats.verify_s, rel=0.01)
    assert stats.realised_speedup is not None and stats.realised_speedup > 1.5
    assert stats.predicted_speedup is not None and stats.predicted_speedup > 1.5
    assert not stats.speculation_paused and stats.speculation_paused_since is None


def test_a_step_that_catches_up_teaches_the_table_nothing(deep_model: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    core = overlapped(deep_model, "small-lm", costs(1.01, 1.01))
    speculation, learned = core.speculation, []
    assert speculation.costs is not None
    monkeypatch.setattr(speculation.costs, "observe", lambda *step: learned.append(step))
    result = StepResult.silent(2, 4)
    result.verify_ms, result.caught_up = 9.0, True
    credit = speculation._state.credit
    speculation.record(result, 16.0, [False, False])
    assert not learned
    assert speculation._state.credit == pytest.approx(credit - 9.0 + 1.0 + 0.01 / 3, abs=1e-6)
    result.caught_up = False
    speculation.record(result, 16.0, [False, False])
    assert len(learned) == 1
    monkeypatch.setattr(core, "speculation", Switching(K))
    seen: list[tuple[int, bool]] = []
    record = core.speculation.record

    def noted(result: StepResult, context: float, counts: Sequence[bool]) -> None:
        seen.append((max(result.num_drafted), result.caught_up))
        record(result, context, counts)

    monkeypatch.setattr(core.speculation, "record", noted)
    run(core, [request("r", prompts(1)[0], 60, ignore_eos=True)])
    assert {drafted for drafted, caught_up in seen if caught_up} == {K}
    assert sum(caught_up for _, caught_up in seen) < sum(drafted > 0 for drafted, _ in seen) / 2


def step(num_rows: int, num_drafted: int, verify_ms: float, draft_ms: float = 0.0) -> StepResult:
    result = StepResult.silent(num_rows, num_rows * (1 + num_drafted))
    result.num_drafted, result.verify_ms, result.draft_ms = [num_drafted] * num_rows, verify_ms, draft_ms
    return result


def test_a_step_that_the_drafter_is_shown_is_paid_by_the_probes_and_teaches_the_plain_cost(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    grid = CostGrid((1, 2), (0, K), (16,))
    table = FixedCosts(grid, np.array([[[1.0], [1.2]]] * 2), follow=np.array([0.1, 0.2]))
    speculation, learned = Speculation(table, K, False), []
    monkeypatch.setattr(table, "observe", lambda *seen: learned.append(seen))
    credit = speculation._state.credit
    shown = step(2, 0, 1.25)
    shown.followed = True
    speculation.record(shown, 16.0, [True, True])
    assert speculation._state.credit == pytest.approx(credit - 0.2)
    assert learned == [(2, 2, 16.0, pytest.approx(1.05))]
    speculation.record(step(2, 0, 1.0), 16.0, [True, True])
    assert speculation._state.credit == pytest.approx(credit - 0.2), "one that it is not shown costs nothing"


def test_what_a_chain_has_missed_is_paid_by_the_probes(monkeypatch: pytest.MonkeyPatch) -> None:
    """On a CPU, where drafting is timed apart: the first chain after a pause catches up, the second tells the price."""
    table = CostTable(CostGrid((1, 2), (0, K), (16,)), np.ones((2, 2, 1)), np.array([[0.0, 0.3], [0.0, 0.4]]))
    speculation = Speculation(table, K, False)
    monkeypatch.setattr(table, "observe", lambda *seen: None)
    speculation.record(step(2, 0, 1.0, 1e-6), 16.0, [True, True])
    credit = speculation._state.credit
    speculation.record(step(2, K, 1.0, 2.4), 16.0, [True, True])
    assert speculation._state.credit == pytest.approx(credit - 2.0)
    assert table.draft_ms(2, K) == 0.4
    for _ in range(60):
        speculation.record(step(2, K, 1.0, 0.8), 16.0, [True, True])
    assert speculation._state.credit == pytest.approx(credit - 2.0)
    assert table.draft_ms(2, K) == pytest.approx(0.8, rel=0.03), "a wrong start-up price is corrected"
    assert table.draft_ms(1, K) == pytest.approx(0.6, rel=0.1), "elsewhere too, as far as it is likely"


@pytest.mark.parametrize("drafter", ["eagle3", "small-lm"])
def test_steps_say_that_the_drafter_was_shown_them(
    deep_model: Any, drafter: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    core = overlapped(deep_model, drafter, costs(1.2, 1.5))
    calls, seen = watch(core, monkeypatch), []
    record = core.speculation.record

    def noted(result: StepResult, context: float, counts: Sequence[bool]) -> None:
        seen.append((result.followed, max(result.num_drafted)))
        record(result, context, counts)

    monkeypatch.setattr(core.speculation, "record", noted)
    run(core, [request("r", prompts(1)[0], 180, ignore_eos=True)])
    followed = [drafted for shown, drafted in seen if shown]
    if drafter == "eagle3":
        assert len(followed) == calls["after_verify"] - calls["draft"] > 0 and set(followed) == {0}
    else:
        assert not followed, "it has no features to see"


def test_what_showing_a_step_costs_is_measured(deep_model: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    core = overlapped(deep_model, "eagle3", costs(1.2, 1.5))
    calls, runner = watch(core, monkeypatch), core.runner
    assert isinstance(runner, GpuRunner)
    follow = _follow_timer(runner, 16)
    assert follow is not None and follow(2) >= 0.0
    assert calls["after_verify"] == calls["features"] == calls["forward"] / 2 > 0
    found = run(core, [request("r", prompts(1)[0], 30, ignore_eos=True)])
    assert found == run(engine(deep_model), [request("r", prompts(1)[0], 30, ignore_eos=True)])
    blind = overlapped(deep_model, "small-lm", costs(1.2, 1.5)).runner
    assert isinstance(blind, GpuRunner) and _follow_timer(blind, 16) is None


class Switching(Speculation):
    """Ten steps with drafts, ten in a pause, and so on."""

    def __init__(self, k: int) -> None:
        super().__init__(None, k, False)
        self.num_asked = 0

    def num_draft_tokens(self, num_rows: int, num_eligible: int) -> int:
        self.num_asked += 1
        return 0 if self.num_asked // 10 % 2 else super().num_draft_tokens(num_rows, num_eligible)

    def follows(self, phase: Phase, num_rows: int) -> bool:
        return False


def test_how_long_before_a_probe_steps_are_shown(deep_model: Any) -> None:
    speculation = Speculation(costs(1.2, 1.5), K, False)
    speculation.tiers = (1, K)
    for _ in range(200):
        speculation.acceptance.update("any", K, 0)
    shown = drafted = since = 0
    for _ in range(600):
        k = speculation.num_draft_tokens(4, 4)
        if k:
            assert since >= K + 1 or shown + drafted < 20, "as many as a chain is long"
            drafted, since = drafted + 1, 0
        elif speculation.follows(Phase.VERIFY, 4):
            shown, since = shown + 1, since + 1
        else:
            assert since == 0, "once begun it goes on to the probe"
    assert speculation.paused
    assert 5 < drafted < 30
    assert shown <= (K + 1) * (drafted + 1)


def test_rows_that_may_not_draft_are_not_shown(deep_model: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    from server.core import SpeculationParams

    core = overlapped(deep_model, "eagle3", costs(1.0, 1.0))
    calls = watch(core, monkeypatch)
    run(core, [request("r", prompts(1)[0], 20, ignore_eos=True, speculation=SpeculationParams(False))])
    assert calls["after_verify"] == calls["draft"] == 0
