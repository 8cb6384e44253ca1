"""How the server behaves when too much is asked of it, when clients do not read, and when processes die.

    python benchmarks/http_load.py overload|slow-readers|kill|stop [--engine scripted|real]

`scripted` puts an engine behind the server that emits one token a step at a fixed pace, so that what is measured is the
HTTP side; `real` is the embedded model. Client and server share the machine's cores.
"""

from __future__ import annotations

import argparse
import asyncio
import os
import signal
import statistics
import sys
import time
from dataclasses import replace
from pathlib import Path

import aiohttp

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from benchmarks.common import Row, median_row, write_result
from benchmarks.http_clients import SlowReaders, body, collect, gaps, offered
from benchmarks.http_target import Target, rss_mib, serving, settled, until_ready


def percentile(values: list[float], share: float) -> float:
    """The smallest value that at least `share` of all values do not exceed."""
    ordered = sorted(values)
    return ordered[min(len(ordered) - 1, int(share * len(ordered)))]


# -- overload --------------------------------------------------------------------------------------------------


def overload(options: argparse.Namespace) -> list[Row]:
    """As many clients as there are places, then ten times as many, alternating."""
    slots, waiting, tokens = (16, 32, 24) if options.engine == "scripted" else (8, 16, 24)
    calm_p99: list[float] = []
    full_p99: list[float] = []
    ratios: list[float] = []
    refusals: list[float] = []
    counts: list[str] = []
    with serving(options, max_num_seqs=slots, max_waiting=waiting) as target:
        asyncio.run(offered(target, slots, tokens, 2.0))
        for _ in range(options.repeats):
            calm = asyncio.run(offered(target, slots + waiting, tokens, options.seconds))
            full = asyncio.run(offered(target, 10 * (slots + waiting), tokens, options.seconds))
            calm_p99.append(percentile(calm.admitted, 0.99) * 1e3)
            full_p99.append(percentile(full.admitted, 0.99) * 1e3)
            ratios.append(full_p99[-1] / calm_p99[-1])
            refusals.append(percentile(full.refused, 0.99) * 1e3)
            counts.append(f"{len(full.admitted)} admitted, {len(full.refused)} refused")
    prefix = f"{target.prefix}/overload"
    return [
        median_row(f"{prefix}/p99_ms/queue_full", calm_p99, "ms", f"{slots + waiting} clients, {tokens} tokens each"),
        median_row(f"{prefix}/p99_ms/ten_times", full_p99, "ms", f"{10 * (slots + waiting)} clients; {counts[-1]}"),
        median_row(f"{prefix}/p99_ratio", ratios, "x"),
        median_row(f"{prefix}/refused_p99_ms", refusals, "ms", "time to the 429, on the client's clock"),
    ]


# -- slow readers ----------------------------------------------------------------------------------------------


def slow_readers(options: argparse.Namespace) -> list[Row]:
    """Eight ordinary streams alone, and beside 64 clients that read a byte a second, alternating on one server."""
    tokens = 200 if options.engine == "scripted" else 48
    slow = body(4000, stream=True, logprobs=20 if options.engine == "real" else None)
    alone: list[float] = []
    beside: list[float] = []
    ratios: list[float] = []
    memory: list[float] = []
    with serving(options, max_num_seqs=16, max_waiting=128, stream_buffer_tokens=64) as target:
        pid = target.process.pid

        async def run() -> None:
            await gaps(target, 8, tokens)
            for _ in range(options.repeats):
                alone.append(statistics.mean(await gaps(target, 8, tokens)) * 1e3)
                before = rss_mib(pid)
                async with SlowReaders(target, 64, slow) as readers:
                    await readers.all_held()
                    memory.append(rss_mib(pid) - before)
                    beside.append(statistics.mean(await gaps(target, 8, tokens)) * 1e3)
                ratios.append(beside[-1] / alone[-1])
                await settled(target)

        asyncio.run(run())
    prefix = f"{target.prefix}/slow_readers"
    return [
        median_row(f"{prefix}/itl_ms/alone", alone, "ms", "8 streams, mean gap between events"),
        median_row(f"{prefix}/itl_ms/beside_64", beside, "ms", "the same beside 64 clients that read a byte a second"),
        median_row(f"{prefix}/itl_ratio", ratios, "x"),
        median_row(f"{prefix}/memory_mib", memory, "MiB", "what the API process grew by for 64 of them"),
    ]


# -- death and end ---------------------------------------------------------------------------------------------


def kill(options: argparse.Namespace) -> list[Row]:
    """SIGKILL of the engine under 16 streams."""
    ends: list[float] = []
    ready: list[float] = []
    how: list[str] = []
    leaks: list[float] = []
    with serving(options, max_num_seqs=16) as target:

        async def run() -> None:
            async with aiohttp.ClientSession(connector=aiohttp.TCPConnector(limit=0)) as http:
                await asyncio.gather(*(collect(http, target.url, body(4, stream=True)) for _ in range(16)))
            before = (await settled(target)).get("process", {})
            for _ in range(options.repeats):
                async with aiohttp.ClientSession(connector=aiohttp.TCPConnector(limit=0)) as http:
                    streams = [
                        asyncio.create_task(collect(http, target.url, body(4000, stream=True))) for _ in range(16)
                    ]
                    await asyncio.sleep(2.0)
                    os.kill(target.engine_pid(), signal.SIGKILL)
                    killed = time.perf_counter()
                    outcomes = await asyncio.gather(*streams)
                ends.append(max(at for _, at, _ in outcomes) - killed)
                how.extend(end for end, _, _ in outcomes)
                ready.append(await until_ready(target.url) - killed)
                after = (await settled(target)).get("process", {})
                leaks.append(sum(max(0, after[name] - before[name]) for name in before if name.startswith("num_")))

        asyncio.run(run())
    prefix = f"{target.prefix}/kill"
    kinds = ", ".join(f"{how.count(end)} {end}" for end in sorted(set(how)))
    return [
        median_row(f"{prefix}/streams_end_s", ends, "s", f"16 streams each: {kinds}"),
        median_row(f"{prefix}/ready_again_s", ready, "s"),
        median_row(f"{prefix}/leaked", leaks, "", "tasks and file descriptors more than before"),
    ]


def stop(options: argparse.Namespace) -> list[Row]:
    """SIGTERM under load: what was admitted is answered."""
    lost: list[float] = []
    took: list[float] = []
    notes: list[str] = []
    for _ in range(options.repeats):
        with serving(options, max_num_seqs=16, drain_timeout_s=60) as target:

            async def run(target: Target = target) -> None:
                async with aiohttp.ClientSession(connector=aiohttp.TCPConnector(limit=0)) as http:
                    streams = [asyncio.create_task(collect(http, target.url, body(32, stream=True))) for _ in range(48)]
                    await asyncio.sleep(1.0)
                    target.process.send_signal(signal.SIGTERM)
                    stopped = time.perf_counter()
                    outcomes = await asyncio.gather(*streams)
                admitted = [o for o in outcomes if not o[0].startswith("status")]
                whole = [o for o in admitted if o[0] == "done" and o[2] >= 1]
                lost.append(float(len(admitted) - len(whole)))
                notes.append(f"{len(admitted)} admitted")
                target.process.wait(60)
                took.append(time.perf_counter() - stopped)

            asyncio.run(run())
    prefix = f"cpu2/http-{options.engine}/stop"
    return [
        median_row(f"{prefix}/lost", lost, "", notes[-1]),
        median_row(f"{prefix}/exit_s", took, "s", "from SIGTERM to the process's end"),
    ]


CASES = {"overload": overload, "slow-readers": slow_readers, "kill": kill, "stop": stop}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("case", choices=CASES)
    parser.add_argument("--engine", choices=("scripted", "real"), default="scripted")
    parser.add_argument("--step-ms", type=float, default=20.0)
    parser.add_argument("--threads", type=int, help="of the engine; by default it takes every core, the clients' too")
    parser.add_argument("--seconds", type=float, default=10.0)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--port", type=int, default=8392)
    options = parser.parse_args()
    rows = CASES[options.case](options)
    name = f"http_{options.case.replace('-', '_')}_{options.engine}"
    if options.threads is not None:
        rows = [replace(row, case=f"{row.case}/threads{options.threads}") for row in rows]
        name += f"_threads{options.threads}"
    write_result(name, rows)


if __name__ == "__main__":
    main()
