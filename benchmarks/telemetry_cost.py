"""CPU time that measuring costs: a request of 64 and of 256 steps, a value in a sketch, a scrape.

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

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import numpy as np

from benchmarks.common import Row, write_result
from server.core import FinishReason
from server.engine.messages import EngineInfo
from server.telemetry.metrics import Metrics
from server.telemetry.sketch import Sketch

REPEATS = 7


def main() -> None:
    rows = [_request(num_steps) for num_steps in (64, 256)]
    rows += [_sketch_value(), *_library_value(), *_scrape()]
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


class _Engine:
    ready, num_restarts, pid = True, 0, None
    info = EngineInfo(
        "model", "Llama", 1, "float32", "cpu", 1, 1, 1, 1, 1, 1, "none", 0, "coupled", "torch", 1, 0.0
    )  # fmt: skip


if __name__ == "__main__":
    main()
