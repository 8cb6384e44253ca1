"""CPU time that the API process spends on a request and on a streamed chunk, before an engine that only speaks.

    python benchmarks/http_cost.py [--profile] [--throughput]

One keep-alive connection a client, chat requests of one short message. A request's cost is that of an answer of one
token; a chunk's is the slope between streams of few and of many chunks, a chunk being one token's event. `--profile`
also writes where the time goes. `--throughput` adds requests a second of one, two and four API workers, with six client
processes; that needs a dozen cores. CPU time is that of all the process's threads.
"""

from __future__ import annotations

import argparse
import asyncio
import cProfile
import json
import pstats
import random
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from benchmarks.common import RESULTS, Row, median_row, write_result

ENGINE = str(Path(__file__).with_name("scripted_engine.py"))
SETTINGS = {"model": "smollm2-135m"}
"""Of the server under test, for the whole run."""
MESSAGE = "What is the capital of France? Answer in one word, please."


# -- the server under test -------------------------------------------------------------------------------------


def run_server(port: int, workers: int, step_ms: float, profile: str | None, model: str) -> None:
    """`outpace serve` with the scripted engine; `profile` names the file for this process's profile."""
    from server.api.event_loop import loop_factory
    from server.api.lifecycle import Backend, Server
    from server.api.load_text import load_text
    from server.api.pool.owner import Pool
    from server.config import EngineConfig, ServerConfig
    from server.engine.client import EngineClient

    engine = EngineConfig(model=model, max_num_seqs=64)
    config = ServerConfig(engine, port=port, api_workers=workers, access_log="/dev/null")
    program = (ENGINE, "--step-ms", str(step_ms))

    async def run() -> None:
        if workers > 1:
            await Pool(config, "benchmark", print, program).run()
        else:
            load = lambda: load_text(config.engine.model)  # noqa: E731
            backend = Backend(config.engine, EngineClient(config.engine, program), load)
            await Server(config, [backend], "benchmark", print).run()

    profiler = cProfile.Profile()
    with asyncio.Runner(loop_factory=loop_factory()) as runner:
        if profile is None:
            runner.run(run())
            return
        profiler.runcall(runner.run, run())
    profiler.dump_stats(profile)


@contextmanager
def server(port: int, workers: int = 1, step_ms: float = 5.0, profile: str | None = None) -> Iterator[list[int]]:
    """A running server; yields the process ids of its API processes."""
    command = [sys.executable, __file__, "--role", "server", "--port", str(port), "--workers", str(workers)]
    command += ["--model", SETTINGS["model"], "--step-ms", str(step_ms)] + (
        [] if profile is None else ["--profile-file", profile]
    )
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL)
    try:
        wait_ready(f"http://127.0.0.1:{port}/ready")
        yield [process.pid] if workers == 1 else children(process.pid, "server.api.pool.worker")
    finally:
        process.terminate()
        process.wait(30)


def wait_ready(url: str) -> None:
    for _ in range(600):
        try:
            with urllib.request.urlopen(url, timeout=5):
                return
        except OSError:
            time.sleep(0.1)
    raise RuntimeError(f"{url} never became ready")


def children(parent: int, module: str) -> list[int]:
    """Process ids of `parent`'s children that run `module`."""
    found = []
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit():
            try:
                if f"PPid:\t{parent}\n" in (entry / "status").read_text() and module in (entry / "cmdline").read_text():
                    found.append(int(entry.name))
            except OSError:
                continue
    return found


def cpu_s(pids: list[int]) -> float:
    """CPU seconds, user and system, that all threads of the processes have used, as the scheduler counts them."""
    threads = [thread for pid in pids for thread in Path(f"/proc/{pid}/task").iterdir()]
    return sum(int((thread / "schedstat").read_text().split()[0]) for thread in threads) / 1e9


# -- the clients -----------------------------------------------------------------------------------------------


def payload(max_tokens: int, stream: bool, number: int = 0) -> bytes:
    """A request whose message nobody has sent before, so that nothing about it is known."""
    message = f"Question {number}: {MESSAGE}"
    body = json.dumps(
        {"messages": [{"role": "user", "content": message}], "max_tokens": max_tokens, "stream": stream}
    ).encode()
    head = (
        "POST /v1/chat/completions HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\n"
        f"Content-Length: {len(body)}\r\n\r\n"
    )
    return head.encode() + body


async def client(port: int, requests: Iterable[bytes], end: bytes) -> None:
    """Sends the requests one after another over one connection; an answer ends with `end`."""
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    for request in requests:
        writer.write(request)
        tail = b""
        while not tail.endswith(end):
            data = await reader.read(65536)
            if not data:
                raise RuntimeError(f"the server closed the connection: {tail!r}")
            tail = (tail + data)[-400:]
        if b"HTTP/1.1 4" in tail or b"HTTP/1.1 5" in tail:
            raise RuntimeError(tail.decode())
    writer.close()
    await writer.wait_closed()


async def load(port: int, num_clients: int, times: int, max_tokens: int, stream: bool) -> float:
    """Seconds for `num_clients` clients to do `times` requests each."""
    numbers = iter(range(random.randrange(10**9), 10**10))
    requests = [[payload(max_tokens, stream, next(numbers)) for _ in range(times)] for _ in range(num_clients)]
    end = b"data: [DONE]\n\n\r\n0\r\n\r\n" if stream else b"}}}"
    started = time.perf_counter()
    await asyncio.gather(*(client(port, mine, end) for mine in requests))
    return time.perf_counter() - started


def measure(port: int, pids: list[int], num_clients: int, times: int, max_tokens: int, stream: bool) -> float:
    """CPU seconds of the API processes for one request of this shape."""
    asyncio.run(load(port, num_clients, max(1, times // 10), max_tokens, stream))
    before = cpu_s(pids)
    asyncio.run(load(port, num_clients, times, max_tokens, stream))
    return (cpu_s(pids) - before) / (num_clients * times)


def requests_per_s(port: int, num_processes: int, times: int) -> float:
    """Whole answers of one token, asked for by that many processes of 16 clients each."""
    command = [sys.executable, __file__, "--role", "client", "--port", str(port), "--times", str(times)]
    started = time.perf_counter()
    clients = [subprocess.Popen(command) for _ in range(num_processes)]
    if any(client.wait() for client in clients):
        raise RuntimeError("a client failed")
    return num_processes * 16 * times / (time.perf_counter() - started)


def throughput(port: int, repeats: int, prefix: str) -> list[Row]:
    """Alternating, in one run."""
    rates: dict[int, list[float]] = {1: [], 2: [], 4: []}
    for _ in range(repeats):
        for workers, values in rates.items():
            with server(port, workers, step_ms=1.0):
                requests_per_s(port, 6, 20)
                # Twice as long: what the clients take to start is the same and falls out.
                short, long = (96 * times / requests_per_s(port, 6, times) for times in (100, 300))
                values.append(96 * 200 / (long - short))
    rows = [median_row(f"{prefix}/http/requests_per_s/workers{n}", v, "1/s") for n, v in rates.items()]
    for workers in (2, 4):
        ratios = [many / one for many, one in zip(rates[workers], rates[1], strict=True)]
        rows.append(median_row(f"{prefix}/http/throughput_ratio/workers{workers}", ratios, "x", "to one worker"))
    return rows


def calibration_ms() -> float:
    """CPU time of a fixed piece of Python: how fast this host is just now, which on shared machines varies twofold."""
    started = time.process_time()
    for number in range(20_000):
        json.loads(json.dumps({"number": number, "text": MESSAGE}))
    return (time.process_time() - started) * 1e3


def costs(port: int, repeats: int, prefix: str) -> list[Row]:
    whole: list[float] = []
    stream_1: list[float] = []
    slopes: dict[int, list[float]] = {1: [], 16: [], 64: []}
    calibrations: list[float] = []
    with server(port, step_ms=1.0) as pids:
        for _ in range(repeats):
            calibrations.append(calibration_ms())
            whole.append(measure(port, pids, 16, 200, 1, False) * 1e3)
            stream_1.append(measure(port, pids, 16, 200, 1, True) * 1e3)
    with server(port, step_ms=4.0) as pids:
        for _ in range(repeats):
            for num_clients, values in slopes.items():
                times = max(2, 24 // num_clients) if num_clients > 1 else 8
                short = measure(port, pids, num_clients, times, 20, True)
                long = measure(port, pids, num_clients, times, 420, True)
                values.append((long - short) / 400 * 1e6)
    rows = [
        median_row(f"{prefix}/http/request_ms", whole, "ms", "whole answer of one token"),
        median_row(f"{prefix}/http/stream_request_ms", stream_1, "ms", "stream of one token"),
        median_row(f"{prefix}/http/calibration_ms", calibrations, "ms", "a fixed piece of Python, between the others"),
    ]
    for num_clients, values in slopes.items():
        rows.append(
            median_row(f"{prefix}/http/chunk_us/streams{num_clients}", values, "us", f"{num_clients} streams at once")
        )
    return rows


def profile(port: int) -> None:
    """Writes where the API process's time goes, for whole answers and for streams."""
    for name, shape in (("requests", (16, 200, 1, False)), ("chunks", (16, 4, 400, True))):
        file = RESULTS / f"http_profile_{name}.txt"
        dump = f"/tmp/outpace-{name}.prof"
        with server(port, step_ms=2.0, profile=dump):
            asyncio.run(load(port, *shape))
        with file.open("w") as out:
            out.write(f"# {shape[0]} clients, {shape[1]} requests each, {shape[2]} tokens, stream={shape[3]}\n")
            pstats.Stats(dump, stream=out).strip_dirs().sort_stats("tottime").print_stats(45)
        print(f"wrote {file.relative_to(RESULTS.parent)}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--role", choices=("benchmark", "server", "client"), default="benchmark")
    parser.add_argument("--port", type=int, default=8391)
    parser.add_argument("--workers", type=int, default=1)
    parser.add_argument("--step-ms", type=float, default=5.0)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--times", type=int, default=100)
    parser.add_argument("--model", default=SETTINGS["model"], help="whose tokenizer and chat template are used")
    parser.add_argument("--prefix", default="cpu2", help="begins the cases' names: the machine")
    parser.add_argument("--throughput", action="store_true")
    parser.add_argument("--profile", action="store_true")
    parser.add_argument("--profile-file")
    options = parser.parse_args()
    if options.role == "server":
        run_server(options.port, options.workers, options.step_ms, options.profile_file, options.model)
        return
    if options.role == "client":
        asyncio.run(load(options.port, 16, options.times, 1, False))
        return
    SETTINGS["model"] = options.model
    rows = costs(options.port, options.repeats, options.prefix)
    if options.throughput:
        rows += throughput(options.port, options.repeats, options.prefix)
    write_result(f"http_cost_{options.prefix}", rows)
    if options.profile:
        profile(options.port)


if __name__ == "__main__":
    main()
