"""What routing and measuring cost: tokens a second of 64 streams and CPU time a request, with and without them.

    python benchmarks/router_cost.py [--step-ms 5] [--repeats 12]

Three servers before engines that only speak, one token a step for every stream: one that measures nothing
(`ab/cost_server.py`), one as shipped, and one with an experiment (control, candidate, baseline; sticky by `user`, a
tenth of the requests in the comparison). All run for the whole time; the same load goes to one after another, in an
order that changes, from a client process of its own. CPU time is that of the API process's threads.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import random
import re
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from benchmarks.common import Row, median_row, write_result
from benchmarks.http_cost import client, cpu_s

SERVER = Path(__file__).parent / "ab" / "cost_server.py"
STREAMS = 64
PLAIN = 'model = "smollm2-135m"\naccess_log = "off"\nmax_num_seqs = 64\n'
EXPERIMENT = """
model = "smollm2-135m"
access_log = "off"
experiment_ledger = "{ledger}"
max_num_seqs = 64
[[arms]]
name = "candidate"
[experiment]
name = "cost"
candidate = "candidate"
stages = [{{share = 5, min_samples = 1000000}}, {{share = 100}}]
"""
MODES = {"unmeasured": ("unmeasured", PLAIN), "measured": ("measured", PLAIN), "experiment": ("measured", EXPERIMENT)}


@contextmanager
def server(name: str, step_ms: float, folder: Path) -> Iterator[tuple[int, int]]:
    """A running server's port and process id."""
    mode, text = MODES[name]
    file, log = folder / f"{name}.toml", folder / f"{name}.log"
    file.write_text(text.format(ledger=folder / "ledger"))
    command = [sys.executable, "-u", str(SERVER), str(step_ms), mode, "--port", "0", "--config", str(file)]
    with log.open("wb") as out:
        process = subprocess.Popen(command, stdout=out, stderr=out)
    said = ""
    try:
        for _ in range(600):
            said = log.read_text()
            found = re.search(r"Ready at http://\S+?:(\d+)/v1", said)
            if found and (name != "experiment" or "Arm baseline serves" in said):
                break
            time.sleep(0.1)
        else:
            raise RuntimeError(f"{name} never became ready: {said}")
        yield int(found[1]), process.pid
    finally:
        process.terminate()
        process.wait(30)


def request(number: int, max_tokens: int) -> bytes:
    """One streamed request of a user of its own."""
    body = json.dumps(
        {
            "prompt": f"Story {number}: once upon a time", "max_tokens": max_tokens, "stream": True,
            "user": f"user-{number}", "ignore_eos": True,
        }
    ).encode()  # fmt: skip
    head = f"POST /v1/completions HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\nContent-Length: {len(body)}"
    return head.encode() + b"\r\n\r\n" + body


async def load(port: int, times: int, max_tokens: int) -> float:
    """Tokens a second of STREAMS clients that do `times` requests each."""
    numbers = iter(range(random.randrange(10**9), 10**10))
    requests = [[request(next(numbers), max_tokens) for _ in range(times)] for _ in range(STREAMS)]
    started = time.perf_counter()
    await asyncio.gather(*(client(port, mine, b"data: [DONE]\n\n\r\n0\r\n\r\n") for mine in requests))
    return STREAMS * times * max_tokens / (time.perf_counter() - started)


def tokens_per_s(port: int, times: int, max_tokens: int) -> float:
    """The same, from a process of its own."""
    command = [sys.executable, __file__, "--role", "client", "--port", str(port), "--times", str(times)]
    command += ["--max-tokens", str(max_tokens)]
    return float(subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout)


def measure(servers: dict[str, tuple[int, int]], options: argparse.Namespace) -> list[Row]:
    """Alternating, in one run."""
    rates: dict[str, list[float]] = {name: [] for name in servers}
    cpu_ms: dict[str, list[float]] = {name: [] for name in servers}
    for repeat in range(-1, options.repeats):
        for name in random.Random(repeat).sample(list(servers), len(servers)):
            port, pid = servers[name]
            before = cpu_s([pid])
            rate = tokens_per_s(port, options.times, options.max_tokens)
            if repeat >= 0:  # the first only warms up
                rates[name].append(rate)
                cpu_ms[name].append(1e3 * (cpu_s([pid]) - before) / (STREAMS * options.times))
    rows = []
    for name in servers:
        rows.append(median_row(f"cpu2/routing/tok_s/{name}", rates[name], "tok/s", f"{STREAMS} streams"))
        what = f"CPU time of the API process, {options.max_tokens} tokens streamed"
        rows.append(median_row(f"cpu2/routing/request_cpu_ms/{name}", cpu_ms[name], "ms", what))
    for name, base in (("measured", "unmeasured"), ("experiment", "unmeasured"), ("experiment", "measured")):
        lost = [100 * (1 - a / b) for a, b in zip(rates[name], rates[base], strict=True)]
        more = [a - b for a, b in zip(cpu_ms[name], cpu_ms[base], strict=True)]
        rows.append(median_row(f"cpu2/routing/throughput_lost/{name}-{base}", lost, "%"))
        rows.append(median_row(f"cpu2/routing/request_cost_ms/{name}-{base}", more, "ms"))
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--role", choices=("benchmark", "client"), default="benchmark")
    parser.add_argument("--step-ms", type=float, default=5.0)
    parser.add_argument("--repeats", type=int, default=12)
    parser.add_argument("--times", type=int, default=8, help="requests of each stream in one load")
    parser.add_argument("--max-tokens", type=int, default=64)
    parser.add_argument("--port", type=int)
    options = parser.parse_args()
    if options.role == "client":
        print(asyncio.run(load(options.port, options.times, options.max_tokens)))
        return
    with tempfile.TemporaryDirectory() as folder, ExitStack() as stack:
        servers = {n: stack.enter_context(server(n, options.step_ms, Path(folder))) for n in MODES}
        write_result("router_cost", measure(servers, options))


if __name__ == "__main__":
    main()
