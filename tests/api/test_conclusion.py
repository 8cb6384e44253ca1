"""After the verdict: one engine goes on, as the control, and nobody is sent to the others."""

from __future__ import annotations

import asyncio
import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from server.api import conclusion
from server.api.conclusion import conclude, stop
from server.api.experiment import settled
from server.api.experiment_terms import terms_of
from server.config import ArmConfig, ConfigError, EngineConfig, ServerConfig
from server.engine.messages import EngineStats
from server.routing.ledger import Ledger
from server.routing.plan import plan_of
from server.routing.verdict import allow_another, read_verdict
from tests.api.conftest import Serve
from tests.api.fakes import FakeEngine, steps
from tests.api.test_experiment import PLAN, TEXT, World, world


async def decided(serve: Serve, ledger: Path, action: Any) -> tuple[World, list[Any]]:
    """A world in which an operator has ended the experiment, and the engines that leave."""
    leaving: list[Any] = []
    worlds: list[World] = []

    def on_over(promoted: bool) -> None:
        w = worlds[0]
        leaving.extend(conclude(w.live.state, w.experiment.conductor.plan, promoted=promoted))

    w = await world(serve, ledger, on_over=on_over, retire=True)
    worlds.append(w)
    w.look()
    await w.ask(20)
    assert await w.experiment.asked(action, "admin") is None
    return w, leaving


async def test_a_promoted_candidate_is_the_control(serve: Serve, tmp_path: Path) -> None:
    w, leaving = await decided(serve, tmp_path / "ledger", "promote")
    state = w.live.state
    assert [arm.name for arm in state.arms.every] == ["control"]
    assert w.live.engine in leaving and len(leaving) == 2
    winner: Any = state.control.engine
    assert winner not in leaving
    before = len(winner.requests)
    assert (await w.live.complete(user="somebody"))[0] == 200
    assert len(winner.requests) == before + 1
    assert (await w.live.complete(model="new"))[0] == 404
    status, metrics = await w.live.get("/metrics")
    assert status == 200 and 'outpace_engine_ready{arm="control"} 1' in metrics
    assert 'outpace_engine_ready{arm="new"}' not in metrics
    assert [m["id"] for m in (await w.live.get("/v1/models"))[1]["data"]] == ["fake"]
    assert "other engines are stopped" in str(await w.experiment.asked("roll_back", "admin"))


async def test_a_candidate_that_was_rolled_back_is_gone(serve: Serve, tmp_path: Path) -> None:
    w, leaving = await decided(serve, tmp_path / "ledger", "roll_back")
    assert w.live.state.control.engine is w.live.engine and w.live.engine not in leaving and len(leaving) == 2
    assert (await w.live.complete(user="somebody"))[0] == 200


async def test_engines_stop_when_their_last_request_has_ended(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(conclusion, "GRACE_S", 0.01)
    engine = FakeEngine(steps("a", "b", "c"), step_s=0.05)
    await engine.wait_ready()

    class Request:
        request_id = "a"
        sampling = type("S", (), {"logprobs": None})

    got: list[Any] = []
    sink = type("Sink", (), {"put": lambda self, output: got.append(output), "started": lambda self: None})()
    engine.submit(Request(), sink)  # type: ignore[arg-type]
    async with asyncio.timeout(10):
        await stop([engine])
    assert len(got) == 3 and engine.closed.is_set()


def told_that_it_is(config: ServerConfig, file: Path) -> None:
    """Its experiment is that of `config`."""
    assert config.experiment is not None
    plan, ledger = plan_of(config.experiment), Ledger(file)
    ledger.write_terms(plan.name, terms_of(config, plan) or {})
    ledger.close()


async def test_the_next_start_knows(serve: Serve, tmp_path: Path) -> None:
    engine = EngineConfig(model="original")
    config = ServerConfig(
        engine=engine,
        arms=(ArmConfig("new", replace(engine, model="better"), recipe="fp8"), ArmConfig("baseline", engine)),
        experiment={**PLAN, "retire": True},
        experiment_ledger=str(tmp_path / "promoted"),
    )
    said: list[str] = []
    assert settled(config, said.append) == (config, None) and not said
    await decided(serve, tmp_path / "promoted", "promote")
    with pytest.raises(ConfigError, match="candidate model = 'fake-dir', not 'better'"):
        settled(config, said.append)
    told_that_it_is(config, tmp_path / "promoted")
    after, recipe = settled(config, said.append)
    assert (after.engine.model, after.arms, recipe) == ("better", (), "fp8") and "is over: promoted" in said[0]
    await decided(serve, tmp_path / "back", "roll_back")
    told_that_it_is(config, tmp_path / "back")
    after, recipe = settled(replace(config, experiment_ledger=str(tmp_path / "back")), said.append)
    assert (after.engine.model, after.arms, recipe) == ("original", (), None)
    kept = replace(config, experiment={**PLAN, "retire": False})
    assert settled(kept, said.append) == (kept, None)


def test_counters_stay_with_the_arm_that_did_the_work() -> None:
    from server.telemetry.engine_stats import EngineStatsCollector

    collector = EngineStatsCollector(lambda: 0.0)
    collector.update("control", EngineStats(num_steps=100, num_emitted=1000, drafted_per_position=[5, 5]))
    collector.update("canary", EngineStats(num_steps=40, num_emitted=70, drafted_per_position=[3, 2]))
    collector.take_over("control", "canary")
    collector.update("control", EngineStats(num_steps=41, num_emitted=75, drafted_per_position=[4, 2]))
    assert (collector.work("control")[1], collector.work("canary")[1]) == (1005, 70)
    drafted = next(family for family in collector.collect() if family.name == "outpace_draft_tokens")
    assert {s.labels["arm"]: s.value for s in drafted.samples} == {"control": 11, "canary": 5}
    collector.stopped("canary")
    assert collector.latest("canary") == EngineStats()


async def test_the_verdict_lies_beside_the_artifact(serve: Serve, tmp_path: Path) -> None:
    w = await world(serve, tmp_path / "ledger", retire=True)
    artifact = tmp_path / "artifact"
    artifact.mkdir()
    w.experiment._artifact = lambda: artifact
    w.look()
    await w.experiment.asked("roll_back", "admin")
    verdict = read_verdict(artifact)
    assert (verdict.status, verdict.experiment, verdict.attempt) == ("rolled_back", "try", 1)
    assert "asked for by admin" in verdict.reason
    assert f"outpace artifacts retry {artifact.name}" in w.said[-1]
    assert allow_another(artifact).attempt == 2 and read_verdict(artifact).status == ""
    (artifact / "verdict.json").write_text("{")
    assert read_verdict(artifact).attempt == 1


async def test_what_prometheus_sees(serve: Serve, tmp_path: Path) -> None:
    w = await world(serve, tmp_path / "ledger")

    async def value(sample: str) -> float:
        _, text = await w.live.get("/metrics")
        (line,) = [line for line in text.splitlines() if line.startswith(sample + " ")]
        return float(line.split()[-1])

    assert await value('outpace_experiment_stage{experiment="try"}') == 0
    assert await value('outpace_experiment_status{experiment="try",status="waiting"}') == 1
    w.look()
    await w.ask(40)
    w.look()
    assert await value('outpace_experiment_stage{experiment="try"}') == 2
    assert await value('outpace_experiment_weight{arm="new",experiment="try"}') == 0.5
    assert await value('outpace_experiment_effect_upper{experiment="try",metric="ttft"}') == float("inf")
    assert await value('outpace_experiment_requests_total{arm="new",experiment="try"}') > 0
    await w.experiment.asked("roll_back", "admin")
    assert await value('outpace_experiment_verdict{experiment="try"}') == -1
    assert await value('outpace_experiment_guard_trips_total{experiment="try",guard="error rate"}') == 0
    state = w.experiment.conductor.state
    assert state is not None
    w.experiment.conductor.state = replace(state, reason="guard rail, error rate: 9 of 10 requests in 60 s")
    assert await value('outpace_experiment_guard_trips_total{experiment="try",guard="error rate"}') == 1


def test_retire_is_checked() -> None:
    with pytest.raises(ValueError, match="retire: 'yes' is not valid; use true or false"):
        plan_of({"candidate": "a", "retire": "yes"})
    assert plan_of(json.loads('{"candidate": "a", "retire": true}')).retire and TEXT
