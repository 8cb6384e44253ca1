"""Experiments on running servers: which verdict, after how many seconds and requests.

    python benchmarks/ab_servers.py [--cases faster,slower20,…] [--minutes 15] [--rate 20] [--keys 400]

Each case is a server with three arms (control, candidate, its baseline) and a client that sends streamed requests: a
Poisson process whose rate triples for 5 s of every 20. All cases run at once, each with its own server. Engines of all
but `equal-engines` only speak (`ab/flawed_engine.py`): every request has a pace of its own, and the candidate's flaw
is the option beside the case's name below. `equal-engines` is the embedded model three times, at a twentieth of the
rate.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import os
import random
import re
import sys
import tempfile
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import aiohttp

from benchmarks.common import Row, write_result

SERVER = Path(__file__).parent / "ab" / "flawed_server.py"
CASES = {
    "faster20": ("--factor 0.8", "promoted"),
    "slower20": ("--factor 1.2", "rolled_back"),
    "tail": ("--tail-share 0.1 --tail-factor 1.6", "rolled_back"),
    "errors2": ("--errors 0.02", "rolled_back"),
    "garbled30": ("--garbled 0.3", "rolled_back"),
    "equal": ("", "running"),
    "equal-engines": (None, "running"),
}
STAGES = """stages = [
    {share = 1, min_samples = 5, min_time_s = 20}, {share = 5, min_samples = 20, min_time_s = 20},
    {share = 25, min_samples = 50, min_time_s = 20}, {share = 50, min_samples = 100, min_time_s = 20},
    {share = 100, min_samples = 100, min_time_s = 20},
]"""
EQUAL_STAGES = "stages = [{share = 50, min_samples = 100, min_time_s = 60}, {share = 100}]"
CONFIG = """
model = "smollm2-135m"
access_log = "off"
experiment_ledger = "{ledger}"
{settings}
[[arms]]
name = "candidate"
[experiment]
name = "{name}"
candidate = "candidate"
{stages}
"""
ENGINE_SETTINGS = "num_threads = 1\nmax_num_seqs = 8\nkv_cache_tokens = 8192\nmax_draft_tokens = 3"
BURST_EVERY_S, BURST_S, BURST = 20.0, 5.0, 3.0
EQUAL_ENGINES_RATE = 0.05
"""Share of the rate: the embedded model three times on two cores."""
TAIL_OF_WARMTH_S = 240.0


@dataclass
class Run:
    """One case: what its client saw and what the server decided."""

    name: str
    expected: str
    url: str = ""
    sent: int = 0
    failed: int = 0
    experiment: dict[str, Any] = field(default_factory=dict)
    events: list[dict[str, Any]] = field(default_factory=list)
    began: float = 0.0
    seconds: float = 0.0
    p95_ms: dict[str, float] = field(default_factory=dict)
    taken_ms: dict[str, list[float]] = field(default_factory=dict)


def read(file: str) -> str:
    """A log as far as it is written."""
    return Path(file).read_text(errors="replace")


async def start(run: Run, flaws: str | None, folder: Path) -> asyncio.subprocess.Process:
    """The server, ready."""
    file = folder / f"{run.name}.toml"
    equal, real = run.expected == "running", flaws is None
    settings, stages = ENGINE_SETTINGS if real else "", EQUAL_STAGES if equal else STAGES
    text = CONFIG.format(ledger=folder / f"{run.name}.ledger", name=run.name, settings=settings, stages=stages)
    file.write_text(text)
    program = ("-m", "server", "serve") if flaws is None else (str(SERVER), flaws)
    command = (sys.executable, *program, "--port", "0", "--config", str(file))
    log = (folder / f"{run.name}.log").open("wb")
    environment = {**os.environ, "PYTHONUNBUFFERED": "1"}
    process = await asyncio.create_subprocess_exec(*command, stdout=log, stderr=log, env=environment)
    end = time.monotonic() + TAIL_OF_WARMTH_S
    while time.monotonic() < end and process.returncode is None:
        said = await asyncio.to_thread(read, log.name)
        found = re.search(r"Ready at (http://\S+?)/v1", said)
        if found and "Arm baseline serves" in said:
            run.url = found[1]
            return process
        await asyncio.sleep(0.2)
    raise SystemExit(f"{run.name}: the server did not start: {(await asyncio.to_thread(read, log.name))[-2000:]}")


async def ask(run: Run, session: aiohttp.ClientSession, user: str, tokens: int) -> None:
    """One streamed request, read to its end."""
    body = {
        "prompt": f"A story for {user}: once", "max_tokens": tokens, "user": user, "stream": True, "ignore_eos": True
    }  # fmt: skip
    run.sent += 1
    started = time.perf_counter()
    try:
        async with session.post(run.url + "/v1/completions", json=body) as response:
            text = await response.read()
            if response.status != 200 or b'"error"' in text:
                run.failed += 1
                return
            arm = response.headers.get("x-outpace-arm", "alone")
            run.taken_ms.setdefault(arm, []).append(1e3 * (time.perf_counter() - started))
    except aiohttp.ClientError:
        run.failed += 1


async def look(run: Run, session: aiohttp.ClientSession) -> bool:
    """Reads where the experiment is; whether it goes on."""
    async with session.get(run.url + "/v1/experiments") as response:
        (run.experiment,) = (await response.json())["data"]
    return run.experiment["status"] in ("running", "waiting", "preparing")


async def drive(run: Run, rate: float, num_keys: int, seconds: float) -> None:
    """Requests until the verdict or the end."""
    rng = random.Random(run.name)
    connector = aiohttp.TCPConnector(limit=0)
    async with aiohttp.ClientSession(connector=connector, timeout=aiohttp.ClientTimeout(120)) as session:
        tasks: set[asyncio.Task[None]] = set()
        while not await look(run, session) or run.experiment["status"] != "running":  # noqa: ASYNC110  it is polled
            await asyncio.sleep(0.2)
        run.began = looked = time.monotonic()
        while (now := time.monotonic()) - run.began < seconds:
            burst = (now - run.began) % BURST_EVERY_S < BURST_S
            await asyncio.sleep(rng.expovariate(rate * (BURST if burst else 1.0)))
            user = f"user-{min(int(rng.paretovariate(1.0)) - 1, num_keys - 1) + rng.randrange(num_keys)}"
            task = asyncio.create_task(ask(run, session, user, rng.randint(12, 36)))
            tasks.add(task)
            task.add_done_callback(tasks.discard)
            if now - looked > 1.0:
                looked = now
                if not await look(run, session):
                    break
        run.seconds = time.monotonic() - run.began
        await look(run, session)
        async with session.get(run.url + "/v1/experiments/events") as response:
            run.events = (await response.json())["data"]
        await asyncio.gather(*tasks, return_exceptions=True)
    for arm, values in run.taken_ms.items():
        values.sort()
        run.p95_ms[arm] = round(values[int(0.95 * (len(values) - 1))], 1)


async def measure(run: Run, flaws: str | None, args: argparse.Namespace, folder: Path) -> None:
    """One case from the server's start to its end."""
    process = await start(run, flaws, folder)
    try:
        share = EQUAL_ENGINES_RATE if flaws is None else 1.0
        seconds = 60 * (min(args.minutes, args.equal_minutes) if run.expected == "running" else args.minutes)
        await drive(run, args.rate * share, args.keys, seconds)
    finally:
        with contextlib.suppress(ProcessLookupError):
            process.terminate()
        await process.wait()
    e = run.experiment
    print(f"{run.name}: {e['status']} after {run.seconds:.0f} s, {run.sent} requests, P95 {run.p95_ms}", flush=True)


def rows(run: Run) -> list[Row]:
    """Whether the verdict was right, and when it came."""
    e, right = run.experiment, run.experiment["status"] == run.expected
    samples = f"{e.get('num_candidate')} of the candidate's and {e.get('num_baseline')} of the baseline's counted"
    note = f"{e['status']}: {e.get('reason') or 'no verdict'}; {run.sent} requests, {run.failed} failed"
    case = f"ab/servers/{{}}/{run.name}"
    p95 = ", ".join(f"{arm} {value:g} ms" for arm, value in sorted(run.p95_ms.items()))
    return [
        Row(case.format("as_expected"), float(right), "bool", note=note),
        Row(case.format("seconds"), round(run.seconds, 1), "s", note=f"{samples}; P95 end to end: {p95}"),
    ]


async def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cases", default=",".join(CASES))
    parser.add_argument("--minutes", type=float, default=15.0, help="longest wait for a verdict")
    parser.add_argument("--equal-minutes", type=float, default=10.0, help="length of the cases without a flaw")
    parser.add_argument("--rate", type=float, default=20.0, help="requests a second of each case outside bursts")
    parser.add_argument("--keys", type=int, default=400, help="different users")
    parser.add_argument("--name", default="ab_servers")
    args = parser.parse_args()
    names = args.cases.split(",")
    runs = [Run(name, CASES[name][1]) for name in names]
    with tempfile.TemporaryDirectory() as folder:
        await asyncio.gather(*(measure(run, CASES[run.name][0], args, Path(folder)) for run in runs))
    detail = {run.name: {"experiment": run.experiment, "events": run.events, "p95_ms": run.p95_ms} for run in runs}
    write_result(args.name, [row for run in runs for row in rows(run)], detail)


if __name__ == "__main__":
    asyncio.run(main())
