"""How much one core of the load test's generator can take: streams at once and chunks a second, and what they cost.

    python benchmarks/loadtest_capacity.py [--streams 2000] [--chunks-per-s 20000] [--seconds 15]

Drives the scripted server of the tests, in a process of its own, with one generator process. Where the machine has no
core to spare for the server, the wall-clock rate is that of both together; chunks for each second of the generator's
own CPU time tell what a core of its own would do.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import urllib.request
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from benchmarks.common import Row, write_result
from loadtest.distribution import constant
from loadtest.plan import Server
from loadtest.processes import run_processes
from loadtest.settings import Asked, Load, Settings, Target

REFERENCE = Path(__file__).resolve().parents[1] / "tests" / "loadtest" / "reference_server.py"
WARM_S = 3.0
"""Streams begin one after another within this time; it is not measured."""


def measure(url: str, streams: int, chunks_per_s: float, seconds: float) -> dict[str, float]:
    """One run; rates are of the time after all streams have begun, costs of the whole run."""
    gap_s = streams / chunks_per_s
    script = json.dumps({"ttft_s": gap_s, "gap_s": gap_s}).encode()
    urllib.request.urlopen(urllib.request.Request(f"{url}/script", script, method="POST")).read()
    num_tokens = max(2, int((WARM_S + seconds) / gap_s))
    load = Load(concurrency=streams, requests=streams, ramp_s=WARM_S)
    settings = Settings(Target(url), load, Asked(input_tokens=constant(20), output_tokens=constant(num_tokens)))
    run = run_processes(settings, Server("reference", "usage"), 0, lambda share, progress: None)
    # Chunks of one read have one time, and each chunk here is one token.
    chunks = [(at, count) for record in run.records for at, count in zip(record.times, record.tokens, strict=True)]
    inside = sum(count for at, count in chunks if WARM_S < at <= WARM_S + seconds)
    health = run.health[0]
    cpu_s = health.cpu_share * max(record.ended for record in run.records)
    lags = sorted(health.lags)
    at_once = sum(record.sent < WARM_S + seconds / 2 < record.ended for record in run.records)
    return {
        "streams": streams,
        "ended_well": sum(record.end == "ok" for record in run.records),
        "streams_at_once": at_once,
        "chunks_per_s": inside / seconds,
        "chunks_per_cpu_s": sum(count for _, count in chunks) / cpu_s,
        "generator_cpu_share": health.cpu_share,
        "p99_lag_ms": 1e3 * lags[int(0.99 * len(lags))],
    }


UNITS = {"p99_lag_ms": "ms", "generator_cpu_share": "share", "chunks_per_s": "1/s", "chunks_per_cpu_s": "1/s"}
"""Of what is no number of streams."""


def main() -> None:
    """Prints a line for each figure and writes the result."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--streams", type=int, default=2000)
    parser.add_argument("--chunks-per-s", type=float, default=20_000.0)
    parser.add_argument("--seconds", type=float, default=15.0)
    options = parser.parse_args()
    with subprocess.Popen([sys.executable, str(REFERENCE), "0"], stdout=subprocess.PIPE, text=True) as server:
        assert server.stdout is not None
        try:
            url = f"http://127.0.0.1:{int(server.stdout.readline())}"
            found = measure(url, options.streams, options.chunks_per_s, options.seconds)
        finally:
            server.terminate()
    rows = [Row(f"cpu2/loadtest/capacity/{key}", round(value, 3), UNITS.get(key, "")) for key, value in found.items()]
    write_result("loadtest_capacity", rows, {"arguments": vars(options)})


if __name__ == "__main__":
    main()
