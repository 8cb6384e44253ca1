"""How long a start takes: whole processes, first with an empty cache, then again with what the first one left there."""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass

import msgspec

from server.bench.engine import Names
from server.bench.report import BenchError, Row, Table, number
from server.config import EngineConfig
from server.engine.environment import engine_environment

_OTHER_CACHES = ("TRITON_CACHE_DIR", "TORCHINDUCTOR_CACHE_DIR")
TIMEOUT_S = 600.0


@dataclass(frozen=True, slots=True)
class StartOrder:
    """What the child process is told: an engine, and the length of the first prompt."""

    engine: EngineConfig
    num_input: int


def start(config: EngineConfig, num_input: int, names: Names, say: Callable[[str], None]) -> tuple[Table, list[Row]]:
    """Seconds from the start of a process to a ready engine and to its first token. Raises BenchError."""
    table, rows = Table("start", ["cache", "ready s", "first token s"], [], num_names=1), []
    with tempfile.TemporaryDirectory() as cache:
        for kind in ("cold", "warm"):
            say(f"start: {kind}")
            ready_s, first_s = start_once(StartOrder(config, num_input), cache)
            table.lines.append([kind, number(ready_s), number(first_s)])
            note = f"process start to first token; ready after {ready_s:.2f} s"
            rows.append(Row(names.case("start_s", kind), round(first_s, 3), "s", None, note))
    return table, rows


def start_once(order: StartOrder, cache: str) -> tuple[float, float]:
    """(seconds to ready, seconds to the first token) of a new process whose caches all lie in `cache`."""
    environment = {**engine_environment(), "OUTPACE_CACHE": cache, "CUDA_CACHE_PATH": os.path.join(cache, "nv")}  # noqa: PTH118
    for name in _OTHER_CACHES:
        environment.pop(name, None)
    started = time.perf_counter()
    child = subprocess.Popen(
        [sys.executable, "-m", "server.bench.start_child"],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        env=environment,
    )
    assert child.stdin is not None and child.stdout is not None
    stamps: list[float] = []
    try:
        with child.stdin, child.stdout:
            child.stdin.write(msgspec.json.encode(order))
            child.stdin.close()
            for line in child.stdout:
                if line.startswith(b"failed: "):
                    raise BenchError(f"start: {line.decode().removeprefix('failed: ').strip()}")
                stamps.append(time.perf_counter() - started)
        child.wait(TIMEOUT_S)
    finally:
        child.kill()
        child.wait()
    if len(stamps) != 2:
        raise BenchError(f"start: the process ended with {child.returncode} before it had said a token")
    return stamps[0], stamps[1]
