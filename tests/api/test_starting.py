"""Arms beside the control: builds one at a time, a refused one is told, a baseline waits for its candidate."""

from __future__ import annotations

import asyncio
import sys
from dataclasses import replace
from pathlib import Path

import pytest

from server.api.builds import BuildError, Builds, Optimizer, output_of
from server.api.starting import ArmStarts, StartError
from server.config import NO_RECIPE, ArmConfig, EngineConfig
from server.engine.messages import EngineInfo
from server.routing.plan import plan_of
from tests.api.fakes import INFO

ENGINE = EngineConfig(model="original")
BUILD = """
import os, sys, time
lock, recipe = sys.argv[1:]
os.mkdir(lock)  # fails where another build is at work
time.sleep(0.1)
os.rmdir(lock)
if recipe == "bad":
    print("outpace optimize: the quantised model is refused: perplexity ratio 1.2", file=sys.stderr)
    raise SystemExit(3)
print("noise")
print("/made/by/" + recipe)
"""


class World:
    """Starts arms in a made-up server; engines named in `broken` do not start."""

    def __init__(self, tmp_path: Path, *broken: str) -> None:
        self.broken = broken
        self.started: dict[str, str] = {}
        self.failed: dict[str, str] = {}
        self.said: list[str] = []
        command = [sys.executable, "-c", BUILD, str(tmp_path / "lock")]
        self.builds = Builds(
            Optimizer(
                lambda config, recipe: [*command, recipe],
                lambda config, recipe, directory: replace(config, model=directory),
            )
        )

    async def start(self, name: str, config: EngineConfig) -> EngineInfo:
        if name in self.broken:
            raise StartError("no memory")
        self.started[name] = config.model
        return INFO

    async def run(self, *arms: ArmConfig, compared: bool = False) -> frozenset[str]:
        plan = plan_of({"candidate": arms[0].name, "baseline": arms[1].name}) if compared else None
        starts = ArmStarts(
            arms, plan, self.builds, start=self.start, failed=self.failed.__setitem__, say=self.said.append
        )
        return await starts.run()


async def test_two_recipes_and_two_drafters_are_built_one_after_the_other(tmp_path: Path) -> None:
    w = World(tmp_path)
    served = await w.run(
        ArmConfig("a", ENGINE, recipe="fp8"),
        ArmConfig("b", replace(ENGINE, drafter="none"), recipe="fp8"),
        ArmConfig("c", ENGINE, recipe="int8"),
        ArmConfig("d", ENGINE),
        ArmConfig("e", ENGINE, recipe=NO_RECIPE),
    )
    made = {"a": "/made/by/fp8", "b": "/made/by/fp8", "c": "/made/by/int8", "d": "original", "e": "original"}
    assert w.started == made and served == set(made) and not w.failed
    assert list(w.started)[:2] == ["d", "e"], "who needs no build does not wait for one"


async def test_a_refused_build_is_told_and_leaves_the_others_serving(tmp_path: Path) -> None:
    w = World(tmp_path)
    assert await w.run(ArmConfig("a", ENGINE, recipe="bad"), ArmConfig("b", ENGINE, recipe="fp8")) == {"b"}
    assert w.failed == {"a": "the quantised model is refused: perplexity ratio 1.2"}
    assert any("a does not start: the quantised model is refused" in line for line in w.said)


async def test_a_baseline_waits_for_its_candidate(tmp_path: Path) -> None:
    w = World(tmp_path)
    await w.run(ArmConfig("new", ENGINE, recipe="fp8"), ArmConfig("base", ENGINE), compared=True)
    assert list(w.started) == ["new", "base"]
    without = World(tmp_path, "new")
    assert await without.run(ArmConfig("new", ENGINE), ArmConfig("base", ENGINE), compared=True) == set()
    assert without.started == {} and "arm new does not serve" in without.failed["base"]


async def test_a_server_that_optimises_nothing_says_so(tmp_path: Path) -> None:
    w = World(tmp_path)
    w.builds = None  # type: ignore[assignment]
    await w.run(ArmConfig("a", ENGINE, recipe="fp8"))
    assert "optimises nothing" in w.failed["a"]


async def test_what_a_build_says_is_passed_on(capsys: pytest.CaptureFixture[str]) -> None:
    program = "import sys; print('[##--] calibrating', file=sys.stderr); print('/made/here')"
    assert await output_of([sys.executable, "-c", program]) == "/made/here"
    assert "calibrating" in capsys.readouterr().err
    with pytest.raises(BuildError, match="could not be started"):
        await output_of(["/no/such/program"])
    with pytest.raises(BuildError, match="status 3"):
        await output_of([sys.executable, "-c", "raise SystemExit(3)"])


async def test_leaving_ends_a_build() -> None:
    task = asyncio.create_task(output_of([sys.executable, "-c", "import time; time.sleep(60)"]))
    await asyncio.sleep(0.3)
    task.cancel()
    async with asyncio.timeout(10):
        await asyncio.gather(task, return_exceptions=True)
    assert task.cancelled()
