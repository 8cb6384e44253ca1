"""What is worse is rolled back: a canary that is slow, one that loses some requests, one that answers with garbage."""

from __future__ import annotations

import asyncio
import itertools
import time
from pathlib import Path
from typing import Any

import aiohttp

from server.engine.errors import EngineUnavailable
from tests.api.conftest import Serve
from tests.api.fakes import FakeEngine, steps
from tests.api.test_experiment import World, world

SENTENCE = "A sentence that is long enough to be looked at, of words that differ from one another, as text has."
TEXT = [f"{word} " for word in SENTENCE.split(" ")]
PARTS = [" ".join(SENTENCE.split(" ")[at : at + 4]) + " " for at in range(0, 20, 4)]
"""Few steps that take long: what a busy machine adds to them is small beside."""
CLIENTS = 20
PATIENCE_S = 60.0
SPEED = 40.0
"""Seconds of the experiment's clock in one of ours: evidence is clustered by blocks of ten seconds and more."""
HALVES = [{"share": 50, "min_samples": 1_000_000}, {"share": 100, "min_samples": 0}]


TIMELESS: dict[str, Any] = {
    "guards": {"min_samples": 1_000_000},
    "tolerances": dict.fromkeys(("ttft", "itl", "tpot", "e2e", "tokens_per_s"), 100.0),
}
"""What a busy machine does to latencies decides nothing."""


class Losing(FakeEngine):
    """Loses one request in fifty."""

    def submit(self, request: Any, sink: Any) -> None:
        if len(self.requests) % 50 == 25:
            self.requests.append(request)
            sink.fail(EngineUnavailable("lost"))
            return
        super().submit(request, sink)


async def verdict(w: World) -> dict[str, Any]:
    """What the experiment says once it is over, under load of many users."""
    users, over = itertools.count(), asyncio.Event()
    began, since = time.time(), time.monotonic()

    def clock() -> float:
        return began + SPEED * (time.monotonic() - since)

    assert w.live.state.watch is not None
    w.live.state.watch._clock = w.experiment.conductor._clock = clock

    async def client() -> None:
        async with aiohttp.ClientSession() as http:
            while not over.is_set():
                body = {"prompt": "Hi", "max_tokens": 200, "user": f"user-{next(users)}"}
                async with http.post(w.live.url + "/v1/completions", json=body) as response:
                    await response.read()

    w.look()
    clients = [asyncio.create_task(client()) for _ in range(CLIENTS)]
    end = time.monotonic() + PATIENCE_S
    while w.status == "running" and time.monotonic() < end:
        await asyncio.sleep(0.3)
        w.look()
    over.set()
    await asyncio.gather(*clients)
    report = w.experiment.conductor.report()
    print(f"{report['status']} after {clock() - began:.0f} s, {report['num_candidate']} requests: {report['reason']}")
    return report


async def test_a_half_slower(serve: Serve, tmp_path: Path) -> None:
    w = await world(
        serve,
        tmp_path / "ledger",
        FakeEngine(steps(*PARTS), step_s=0.09),
        control=FakeEngine(steps(*PARTS), step_s=0.06),
        stages=HALVES,
        guards=TIMELESS["guards"],
    )
    report = await verdict(w)
    assert report["status"] == "rolled_back"
    assert report["reason"].split()[0] in ("itl", "tpot", "e2e", "tokens_per_s")


async def test_two_errors_in_a_hundred(serve: Serve, tmp_path: Path) -> None:
    w = await world(
        serve, tmp_path / "ledger", Losing(steps(*TEXT)), control=FakeEngine(steps(*TEXT)), stages=HALVES, **TIMELESS
    )
    report = await verdict(w)
    assert report["status"] == "rolled_back"
    assert report["reason"].startswith("errors is worse")


async def test_garbled(serve: Serve, tmp_path: Path) -> None:
    garbage = FakeEngine(steps("la " * 60))
    w = await world(serve, tmp_path / "ledger", garbage, control=FakeEngine(steps(*TEXT)), stages=HALVES, **TIMELESS)
    report = await verdict(w)
    assert report["status"] == "rolled_back"
    assert report["reason"].split()[0] in ("garbled", "compression", "output_tokens")
