"""An experiment beside a server: what requests show reaches it, and its weights become the arms'."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from server.api.arm import Arm
from server.api.errors import queue_full
from server.api.experiment import Experiment, experiment_of
from server.config import ArmConfig, ConfigError, EngineConfig
from server.engine.errors import EngineUnavailable
from server.routing.conductor import Conductor
from server.routing.evidence.observation import Observation
from server.routing.ledger import Ledger
from server.routing.plan import plan_of
from tests.api.conftest import Live, Serve
from tests.api.fakes import FakeEngine, steps

TEXT = "A sentence that is long enough to be looked at, of words that differ from one another, as readable text has."
STAGES = [{"share": 30, "min_samples": 5, "min_time_s": 0.0}, {"share": 50, "min_samples": 5, "min_time_s": 0.0}]
PLAN = {"name": "try", "candidate": "new", "stages": [*STAGES, {"share": 100, "min_samples": 0, "min_time_s": 0.0}]}
KEYS = "[admin]\nhash = '{admin}'\n"


class Failing(FakeEngine):
    """Every second request is lost."""

    def submit(self, request: Any, sink: Any) -> None:
        if len(self.requests) % 2:
            self.requests.append(request)
            sink.fail(EngineUnavailable("lost"))
            return
        super().submit(request, sink)


class World:
    """A live server with the arms of an experiment, and its log."""

    def __init__(self, live: Live, experiment: Experiment, said: list[str]) -> None:
        self.live, self.experiment, self.said = live, experiment, said

    async def ask(self, count: int, first: int = 0) -> list[str]:
        """The arms that answered so many users."""
        arms = []
        for number in range(first, first + count):
            body = {"prompt": "Hi", "max_tokens": 200, "user": f"user-{number}"}
            async with self.live.http.post(self.live.url + "/v1/completions", json=body) as response:
                arms.append(response.headers["x-outpace-arm"])
        return arms

    def look(self) -> None:
        assert self.live.state.watch is not None
        for arm, seen in self.live.state.watch.take().items():
            self.experiment.take(arm, seen)
        self.experiment.look()

    @property
    def status(self) -> str:
        return str(self.experiment.conductor.report()["status"])


async def world(
    serve: Serve,
    ledger: Path,
    new: FakeEngine | None = None,
    control: FakeEngine | None = None,
    on_over: Callable[[bool], None] = lambda promoted: None,
    **plan: Any,
) -> World:
    """The baseline is as the control."""
    control = control or FakeEngine(steps(TEXT))
    engine = EngineConfig(model="fake-dir")
    live = await serve(
        control,
        others={
            "new": new or FakeEngine(steps(TEXT)),
            "baseline": FakeEngine(control.script, step_s=control.step_s),
        },
        server={
            "arms": (ArmConfig("new", engine), ArmConfig("baseline", engine)),
            "experiment": {**PLAN, **plan},
            "experiment_ledger": str(ledger),
        },
    )
    said: list[str] = []
    made = experiment_of(live.state, said.append, on_over)
    assert made is not None
    return World(live, made, said)


async def test_before_it_begins_all_is_the_controls(serve: Serve, tmp_path: Path) -> None:
    w = await world(serve, tmp_path / "ledger")
    assert set(await w.ask(20)) == {"control"}
    assert w.status == "waiting"
    w.look()
    assert w.status == "running"
    arms = await w.ask(120)
    assert {name: arms.count(name) for name in ("new", "baseline")}["new"] > 15
    assert arms.count("baseline") > 15
    assert await w.ask(120) == arms, "a user stays where they are"


async def test_what_requests_show_is_written_down(serve: Serve, tmp_path: Path) -> None:
    w = await world(serve, tmp_path / "ledger")
    w.look()
    arms = await w.ask(60)
    w.look()
    told = w.experiment.conductor.report()
    assert (told["num_candidate"], told["num_baseline"]) == (arms.count("new"), arms.count("baseline"))
    (first,) = [seen for seen, candidate, _ in w.experiment._ledger.observations("try") if candidate]
    one = first[0]
    assert one.ttft_ms is not None and one.e2e_ms is not None and 0 < one.ttft_ms <= one.e2e_ms
    assert one.output_tokens == len(TEXT) + 1
    assert one.compression_ratio is not None and not one.error and not one.garbled


async def test_only_assigned_requests_count(serve: Serve, tmp_path: Path) -> None:
    w = await world(serve, tmp_path / "ledger")
    w.look()
    for fields in ({"model": "new"}, {"model": "baseline"}):
        assert (await w.live.complete(**fields))[0] == 200
    assert w.live.state.watch is not None
    assert w.live.state.watch.take() == {}


async def test_a_candidate_that_fails_is_rolled_back_at_once(serve: Serve, tmp_path: Path) -> None:
    w = await world(serve, tmp_path / "ledger", Failing(steps(TEXT)))
    w.look()
    for first in range(0, 400, 40):
        await w.ask(40, first)
        w.look()
        if w.status != "running":
            break
    assert w.status == "rolled_back"
    assert "error rate" in w.experiment.conductor.report()["reason"]
    assert set(await w.ask(60)) == {"control"}
    assert "rolled back" in w.said[-1]


async def test_garbage_is_seen(serve: Serve, tmp_path: Path) -> None:
    w = await world(serve, tmp_path / "ledger", FakeEngine(steps("la " * 60)))
    w.look()
    await w.ask(60)
    assert w.live.state.watch is not None
    seen = w.live.state.watch.take()
    assert all(one.garbled for one in seen["new"])
    assert not any(one.garbled for one in seen["baseline"])


async def test_it_goes_on_after_a_restart(serve: Serve, tmp_path: Path) -> None:
    w = await world(serve, tmp_path / "ledger")
    w.look()
    arms = await w.ask(80)
    w.look()
    assert w.experiment.conductor.report()["stage"] == 1, "enough was seen for the next stage"
    arms = await w.ask(80)
    w.look()
    before = w.experiment.conductor.report()
    w.experiment.close()
    again = await world(serve, tmp_path / "ledger")
    after = again.experiment.conductor.report()
    same = ("status", "stage", "weights", "num_candidate", "num_baseline", "started", "stage_started")
    assert {name: after[name] for name in same} == {name: before[name] for name in same}
    assert "goes on" in again.said[0]
    assert await again.ask(80) == arms


async def test_a_name_is_of_one_experiment(serve: Serve, tmp_path: Path) -> None:
    w = await world(serve, tmp_path / "ledger")
    w.look()
    w.experiment.close()
    for change in ({"goal": "no_worse"}, {"stages": PLAN["stages"][1:]}, {"alpha": 0.01}):  # type: ignore[index,unused-ignore]
        with pytest.raises(ConfigError, match=f"'try' is in the ledger already, with plan {next(iter(change))} = "):
            await world(serve, tmp_path / "ledger", **change)
    other = await world(serve, tmp_path / "ledger", name="another", goal="no_worse")
    assert other.status == "waiting"


async def test_while_one_of_the_two_does_not_serve_nothing_is_compared(serve: Serve, tmp_path: Path) -> None:
    w = await world(serve, tmp_path / "ledger")
    w.look()
    await w.ask(40)
    w.look()
    before = w.experiment.conductor.report()
    assert before["num_candidate"] > 0
    w.experiment._not_ready = lambda: {"baseline": "it is being restarted"}
    w.look()
    await w.ask(60)
    w.look()
    after = w.experiment.conductor.report()
    assert (after["num_candidate"], after["num_baseline"]) == (before["num_candidate"], before["num_baseline"])
    assert w.experiment.conductor._recent["new"].window(time.time()).num_requests > before["num_candidate"]


async def test_what_clients_suffer_counts(serve: Serve, tmp_path: Path) -> None:
    """A full queue, an engine that takes nothing, and a client that no longer waits."""
    new = FakeEngine(steps(TEXT))
    w = await world(serve, tmp_path / "ledger", new)
    w.look()
    user = f"user-{(await w.ask(30)).index('new')}"
    watch, new.step_s = w.live.state.watch, 5.0
    assert watch is not None
    watch.take()
    with pytest.raises(TimeoutError):
        async with asyncio.timeout(0.5):
            await w.live.complete(user=user, max_tokens=200)
    seen: list[Observation] = []
    async with asyncio.timeout(10):
        while not seen:
            await asyncio.sleep(0.01)
            seen = watch.take().get("new", [])
    (left,) = seen
    assert not left.error and left.e2e_ms is not None and left.e2e_ms >= 400
    assert left.ttft_ms == left.e2e_ms and left.output_tokens is None

    def full(arm: Arm, requests: object) -> None:
        raise queue_full(1, 1)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Arm, "admit", full)
        assert (await w.live.complete(user=user))[0] == 429
    assert [one.error for one in watch.take()["new"]] == [True]

    def gone(request: Any, sink: Any) -> None:
        raise EngineUnavailable("it has just died")

    new.submit = gone  # type: ignore[method-assign]
    assert (await w.live.complete(user=user))[0] == 503
    assert [one.error for one in watch.take()["new"]] == [True]


async def test_a_look_that_fails_is_not_the_last(serve: Serve, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    w = await world(serve, tmp_path / "ledger")
    monkeypatch.setattr("server.api.experiment.LOOK_EVERY_S", 0.01)
    calls: list[int] = []

    def look() -> None:
        calls.append(1)
        raise ValueError("said to a closed pipe")

    w.experiment.look = look  # type: ignore[method-assign]
    task = asyncio.create_task(w.experiment.run())
    async with asyncio.timeout(10):
        while len(calls) < 3:  # noqa: ASYNC110  it is polled
            await asyncio.sleep(0.01)
    task.cancel()


async def test_evidence_begins_with_the_experiment(tmp_path: Path) -> None:
    now = 0.0
    conductor = Conductor(plan_of(PLAN), Ledger(tmp_path / "ledger"), clock=lambda: now)
    conductor.tick(ready=False, restarts=0)
    now = 3600.0  # a candidate may take an hour to be built
    conductor.tick(ready=True, restarts=0)
    assert conductor._evidence.start_s == 3600.0 and conductor.state is not None


async def test_what_is_told(serve: Serve, tmp_path: Path) -> None:
    w = await world(serve, tmp_path / "ledger")
    w.look()
    await w.ask(30)
    w.look()
    status, answer = await w.live.get("/v1/experiments")
    assert status == 200
    (told,) = answer["data"]
    assert (told["name"], told["status"]) == ("try", "running")
    assert {finding["metric"] for finding in told["findings"]} >= {"ttft", "itl", "tpot", "errors", "garbled"}
    events = (await w.live.get("/v1/experiments/events"))[1]["data"]
    assert events[0]["kind"] == "start" and events[0]["weights"]["new"] == 30


async def test_a_server_without_one(live: Live) -> None:
    assert await live.get("/v1/experiments") == (200, {"object": "list", "data": []})
    assert await live.get("/v1/experiments/events") == (200, {"object": "list", "data": []})


async def test_an_operator_decides(serve: Serve, tmp_path: Path) -> None:
    w = await world(serve, tmp_path / "ledger")
    assert await w.experiment.asked("promote", "admin") == "the experiment has not begun: its arms are not ready"
    w.look()
    assert await w.experiment.asked("pause", "admin") is None
    assert w.status == "paused"
    assert await w.experiment.asked("resume", "admin") is None
    assert await w.experiment.asked("promote", "admin") is None
    assert set(await w.ask(30)) == {"new"}
    assert await w.experiment.asked("pause", "admin") == "an experiment that is promoted cannot do that"
    assert await w.experiment.asked("roll_back", "admin") is None
    assert set(await w.ask(30)) == {"control"}
    kinds = [event["kind"] for event in await w.experiment.decisions()]
    assert kinds == ["start", "pause", "resume", "promote", "roll_back"]
    assert {event["actor"] for event in await w.experiment.decisions()} == {"", "admin"}


async def test_actions_need_the_admin_key(serve: Serve, tmp_path: Path) -> None:
    w = await world(serve, tmp_path / "ledger")
    assert (await w.live.post("/admin/experiment/promote", {}))[0] == 403


async def test_a_ledger_that_cannot_be_used_is_refused(serve: Serve, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"experiment_ledger: .* cannot be used"):
        await world(serve, tmp_path / "no" / "folder" / "ledger")


async def test_it_looks_by_itself(serve: Serve, tmp_path: Path) -> None:
    w = await world(serve, tmp_path / "ledger")
    task = asyncio.create_task(w.experiment.run(w.live.state.watch))
    while w.status != "running":  # noqa: ASYNC110 - the test's timeout ends this
        await asyncio.sleep(0.05)
    task.cancel()
