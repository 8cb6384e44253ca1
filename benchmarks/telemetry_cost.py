"""CPU time that measuring and routing cost: a request of 64 and of 256 steps, a value in a sketch, a scrape; the
assignment of a request, what an experiment makes of one that it compares, and a look at the evidence, each second.

    python benchmarks/telemetry_cost.py

A request's cost is everything that is measured of one choice from its arrival to its end, on a clock that moves 5 ms a
step, so that buffers and window slots turn over as they do in service. One value in a sketch is shown beside the
library `ddsketch` where that is installed.
"""

from __future__ import annotations

import importlib
import itertools
import statistics
import sys
import time
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path
from tempfile import TemporaryDirectory
from types import SimpleNamespace

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import numpy as np

from benchmarks.common import Row, write_result
from server.api.observing import observation
from server.core import FinishReason
from server.engine.messages import EngineInfo
from server.routing.assignment import Assignment
from server.routing.conductor import Conductor
from server.routing.evidence.evidence import Evidence
from server.routing.evidence.observation import Observation
from server.routing.ledger import Ledger
from server.routing.plan import Plan
from server.telemetry.metrics import Metrics
from server.telemetry.sketch import Sketch

REPEATS = 7


def main() -> None:
    rows = [_request(num_steps) for num_steps in (64, 256)]
    rows += [_sketch_value(), *_library_value(), *_scrape()]
    rows += [_assignment(), _compared(), *(_look(count) for count in (1_000, 10_000, 50_000))]
    for row in rows:
        print(f"{row.case:44s} {row.value:9.3f} {row.unit}")
    write_result("telemetry_cost", rows)


def _row(case: str, unit: str, measure: Callable[[], float], note: str = "") -> Row:
    """The median of several runs, each in seconds."""
    scale = {"ms": 1e3, "us": 1e6}[unit]
    times = [measure() * scale for _ in range(REPEATS)]
    return Row(case, statistics.median(times), unit, (min(times), max(times)), note)


def _request(num_steps: int) -> Row:
    ticks = itertools.count()
    metrics = Metrics("benchmark", lambda: next(ticks) * 0.005)

    def measure(num_requests: int = 200) -> float:
        started = time.process_time()
        for _ in range(num_requests):
            arm = metrics.of("control")
            arm.admitted(100)
            timer = arm.choice_timer(metrics.clock(), 100, num_steps)
            timer.started()
            for _ in range(num_steps):
                timer.observe_step(2)
            timer.finish(FinishReason.LENGTH, 2 * num_steps)
        metrics.measured()
        return (time.process_time() - started) / num_requests

    return _row(f"telemetry/request_ms/{num_steps}-steps", "ms", measure)


def _values() -> np.ndarray:
    return np.random.default_rng(0).lognormal(-4, 1, 51_200)


def _sketch_value() -> Row:
    values = _values()

    def measure() -> float:
        sketch, started = Sketch(), time.process_time()
        for part in np.split(values, 100):
            sketch.add(part)
        return (time.process_time() - started) / len(values)

    return _row("telemetry/sketch_value_us", "us", measure, "in batches of 512")


def _library_value() -> list[Row]:
    if find_spec("ddsketch") is None:
        return []
    library = importlib.import_module("ddsketch")
    values = _values().tolist()

    def measure() -> float:
        sketch, started = library.DDSketch(0.01), time.process_time()
        for value in values:
            sketch.add(value)
        return (time.process_time() - started) / len(values)

    return [_row("telemetry/sketch_value_us/ddsketch-library", "us", measure)]


def _scrape() -> list[Row]:
    """Of a server that has run for an hour."""
    now = 0.0
    metrics = Metrics("benchmark", lambda: now)
    metrics.watch_engine("control", _Engine())
    rng = np.random.default_rng(0)
    arm = metrics.of("control")
    for now in np.arange(0.0, 3600.0, 1.0).tolist():
        for gap in rng.lognormal(-4, 0.5, 20).tolist():
            arm.gaps.add(gap, now, 2)
        for buffer in (arm.ttft, arm.e2e, arm.tpot, arm.queue):
            buffer.add(float(rng.lognormal(-1, 1)), now)

    def timed(function: Callable[[], bytes]) -> Callable[[], float]:
        def measure() -> float:
            started = time.process_time()
            function()
            return time.process_time() - started

        return measure

    return [
        _row("telemetry/scrape_ms/metrics", "ms", timed(metrics.render)),
        _row("telemetry/scrape_ms/stats", "ms", timed(metrics.stats)),
    ]


def _assignment() -> Row:
    """Of a key, three arms having traffic."""
    assignment = Assignment({"control": 90.0, "candidate": 5.0, "baseline": 5.0}, "salt")
    keys = [f"user-{i}" for i in range(20_000)]

    def measure() -> float:
        started = time.process_time()
        for key in keys:
            assignment(key)
        return (time.process_time() - started) / len(keys)

    return _row("routing/assignment_us", "us", measure)


def _compared() -> Row:
    """Of a request of the candidate or the baseline: its answer read, its numbers into ledger and evidence."""
    plan = Plan("cost", "candidate", "baseline")
    text = "Once upon a time there was a miller who had three sons, a mill, a donkey and a cat. " * 3

    def measure(num_requests: int = 200, num_seconds: int = 20) -> float:
        with TemporaryDirectory() as folder:
            conductor = Conductor(plan, Ledger(Path(folder) / "ledger"))
            conductor.tick(ready=True, restarts=0)
            metrics = Metrics("benchmark", time.perf_counter)
            parts = []
            for _ in range(num_requests):
                timer = metrics.of("candidate").choice_timer(metrics.clock(), 100, 64)
                timer.gaps = []
                timer.started()
                for _ in range(64):
                    timer.observe_step(1)
                timer.finish(FinishReason.LENGTH, 64)
                parts.append(SimpleNamespace(timer=timer, text=SimpleNamespace(kept=[text])))
            started = time.process_time()
            for second in range(num_seconds):
                made = [observation(f"user-{i}", time.time(), 8, [part]) for i, part in enumerate(parts)]  # type: ignore[list-item]
                conductor.observe("candidate" if second % 2 else "baseline", [one for one in made if one])
            return (time.process_time() - started) / (num_requests * num_seconds)

    return _row(
        "routing/compared_request_ms", "ms", measure, "answers of 250 characters and 64 steps, written once a second"
    )


def _look(count: int) -> Row:
    """At the evidence of so many requests an arm."""
    rng = np.random.default_rng(0)
    evidence = Evidence(0.0)
    for candidate in (True, False):
        times, keys = np.sort(rng.uniform(0, count / 5, count)), rng.integers(0, count // 10 + 5, count)
        columns = rng.gamma(4.0, 1.0, (count, 7))
        seen = [
            Observation(int(key), float(at), int(running), False, *values.tolist())
            for key, at, running, values in zip(keys, times, rng.integers(1, 20, count), columns, strict=True)
        ]
        evidence.add(seen, candidate=candidate, stage=1)

    def measure() -> float:
        started = time.process_time()
        evidence.findings(count / 5, 0.05)
        return time.process_time() - started

    return _row(f"routing/look_ms/{count}", "ms", measure, "requests an arm")


class _Engine:
    ready, num_restarts, pid = True, 0, None
    info = EngineInfo(
        "model", "Llama", 1, "float32", "cpu", 1, 1, 1, 1, 1, 1, "none", 0, "coupled", "torch", 1, 0.0
    )  # fmt: skip


if __name__ == "__main__":
    main()
