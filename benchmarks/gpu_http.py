"""What HTTP costs on top of the engine: streams through `outpace serve` against `outpace bench`, on one machine.

    python benchmarks/gpu_http.py [--case 135m,8b] [--model DIR] [--workers 1,2,4,8] [--streams 1,64]

`135m` is the served model, `8b` random weights of Llama-3.1-8B's shape behind a tokenizer of that size. First the
engine without HTTP, then the same load as that many streams at once, greedy, one token a step: milliseconds between a
stream's tokens while all streams decode, and the share of the engine's tokens a second that is lost. Clients are
processes of their own that only count events. CPU shares say what bounds a case.
"""

from __future__ import annotations

import argparse
import json
import os
import signal
import statistics
import subprocess
import sys
import tempfile
import time
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from benchmarks.common import ROOT, Row, median_row, write_result
from benchmarks.http_cost import children, cpu_s
from benchmarks.http_streams import Load, Seen, drive, summary
from benchmarks.shape_server import write_shape

SHAPES = {"8b": "llama-3.1-8b", "tiny": "tiny"}
READY_TIMEOUT_S = 180
LOG_LINES = 40

# -- the server and the engine alone -----------------------------------------------------------------------------


@contextmanager
def serving(command: list[str], workers: int, port: int, log: Path) -> Iterator[tuple[list[int], list[int]]]:
    """A running server; yields the process ids of its API processes and of its engine.

    What it writes goes to `log`, whose end is a note of whatever is raised meanwhile. RuntimeError: it does not get
    ready.
    """
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])}
    command = [*command, "--api-workers", str(workers), "--port", str(port)]
    with log.open("wb") as file:
        process = subprocess.Popen(command, stdout=file, stderr=subprocess.STDOUT, env=environment, cwd=ROOT)
    try:
        started = time.perf_counter()
        wait_ready(process, port)
        print(f"{workers} API workers: ready after {time.perf_counter() - started:.1f} s", flush=True)
        engines = children(process.pid, "shape_engine.py") + children(process.pid, "server.engine.process")
        members = children(process.pid, "server.api.pool.worker")
        yield (members if workers > 1 else [process.pid]), engines
    except Exception as error:
        lines = log.read_text(errors="replace").splitlines()[-LOG_LINES:]
        error.add_note("\n".join(["The last that the server wrote:", *lines]))
        raise
    finally:
        process.send_signal(signal.SIGTERM)
        try:
            process.wait(30)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()


def wait_ready(process: subprocess.Popen[bytes], port: int) -> None:
    """Raises RuntimeError if the server ends, or is not ready in READY_TIMEOUT_S."""
    deadline = time.perf_counter() + READY_TIMEOUT_S
    while time.perf_counter() < deadline:
        try:
            with urllib.request.urlopen(f"http://127.0.0.1:{port}/ready", timeout=5):
                return
        except OSError:
            if process.poll() is not None:
                raise RuntimeError(f"the server ended with {process.returncode}") from None
            time.sleep(0.1)
    raise RuntimeError(f"the server is not ready after {READY_TIMEOUT_S} s")


def engine_flags(args: argparse.Namespace) -> list[str]:
    """What the engine alone and the engine behind HTTP are both told."""
    most = max(args.streams)
    tokens = most * (args.input + args.output + 64)
    settings = {"drafter": "none", "max-num-seqs": most, "kv-cache-tokens": tokens, "device": args.device}
    settings |= {"max-model-len": max(1024, args.input + args.output + 16), "max-num-batched-tokens": 16384}
    words = [word for name, value in settings.items() for word in (f"--{name}", str(value))]
    return [*words, "--no-prefix-cache", "--no-adaptive"]


def bench(case: str, args: argparse.Namespace, folder: Path) -> dict[int, float]:
    """Milliseconds a decode step by `outpace bench`, by batch size."""
    which = ["--random-weights", SHAPES[case]] if case in SHAPES else ["--model", args.model]
    file = folder / "bench.json"
    command = [sys.executable, "-m", "server", "bench", *which, *engine_flags(args), "--only", "latency"]
    command += ["--batch", ",".join(map(str, args.streams)), "--input", str(args.input), "--output", str(args.output)]
    subprocess.run(
        [*command, "--repeats", str(args.repeats), "--json", str(file)], cwd=ROOT, check=True, stdout=sys.stderr
    )
    rows = json.loads(file.read_text())["rows"]
    return {int(r["case"].rsplit("/b", 1)[1]): float(r["value"]) for r in rows if "/decode_ms/" in r["case"]}


# -- cases -----------------------------------------------------------------------------------------------------


def measure(case: str, args: argparse.Namespace, folder: Path) -> Iterator[Row]:
    name = f"{case}-{'bf16' if args.device != 'cpu' else 'f32'}"
    alone = bench(case, args, folder)
    if case in SHAPES:
        directory = write_shape(folder / case, SHAPES[case])
        command = [sys.executable, str(Path(__file__).with_name("shape_server.py")), "--model", str(directory)]
    else:
        command = [sys.executable, "-m", "server", "serve", "--model", args.model]
    command += [*engine_flags(args), "--access-log", "off", "--log-level", "error"]
    best: dict[int, tuple[float, int, str]] = {}
    for workers in args.workers:
        with serving(command, workers, args.port, folder / "server.log") as (members, engines):
            for streams in args.streams:
                load = Load(streams, args.input, args.output, 128_000 if case == "8b" else args.vocab)
                rows, loss, note = one_load(name, load, workers, alone[streams], args, members, engines)
                yield from rows
                if streams not in best or loss < best[streams][0]:
                    best[streams] = loss, workers, note
    for streams, (loss, workers, note) in best.items():
        yield Row(f"h100/http_loss_pct/{name}/b{streams}", loss, "%", None, f"{workers} API workers; {note}")


def one_load(
    name: str,
    load: Load,
    workers: int,
    alone_ms: float,
    args: argparse.Namespace,
    members: list[int],
    engines: list[int],
) -> tuple[list[Row], float, str]:
    drive(args.port, Load(load.streams, load.num_input, 8, load.vocab), seed=0)
    seen: list[Seen] = []
    shares: list[tuple[float, float]] = []
    for repeat in range(args.repeats):
        before, started = [cpu_s([pid]) for pid in members + engines], time.perf_counter()
        streams = drive(args.port, load, seed=repeat + 1)
        took = time.perf_counter() - started
        seen.append(summary(streams, load))
        used = [(cpu_s([p]) - b) / took for p, b in zip(members + engines, before, strict=True)]
        shares.append((max(used[: len(members)]), sum(used[len(members) :])))
    steps = [s.step_ms for s in seen]
    loss = round(100 * (1 - alone_ms / statistics.median(steps)), 2)
    busiest, engine = (round(100 * statistics.median(share)) for share in zip(*shares, strict=True))
    note = f"busiest worker {busiest} % of a core, engine {engine} %; {seen[0].events_a_token:.3f} events a token"
    where = f"{name}/b{load.streams}/workers{workers}"
    rates = [1e3 * load.streams / ms for ms in steps]
    rows = [
        median_row(f"h100/http_step_ms/{where}", steps, "ms", f"bench {alone_ms:.3f} ms, {loss} % lost; {note}"),
        median_row(f"h100/http_tok_s/{where}", rates, "tok/s", f"bench {1e3 * load.streams / alone_ms:.0f}"),
        median_row(f"h100/http_itl_p99_ms/{where}", [s.gap_p99_ms for s in seen], "ms"),
        median_row(f"h100/http_first_ms/{where}", [s.first_ms for s in seen], "ms", "all streams begin at once"),
    ]
    return rows, loss, note


def numbers(text: str) -> list[int]:
    return [int(part) for part in text.split(",")]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--case", default="135m,8b", help="135m (the served model), 8b (random weights)")
    parser.add_argument("--model", default="smollm2-135m")
    parser.add_argument("--vocab", type=int, default=49_000, help="prompt ids of the served model are below this")
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--workers", type=numbers, default=[1, 2, 4, 8], help="numbers of API workers")
    parser.add_argument("--streams", type=numbers, default=[1, 64])
    parser.add_argument("--input", type=int, default=128)
    parser.add_argument("--output", type=int, help="tokens of a stream (135m: 1024, others 256)")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--port", type=int, default=8397)
    args = parser.parse_args()
    wanted = args.output
    for case in args.case.split(","):
        args.output = wanted or (1024 if case == "135m" else 256)
        rows: list[Row] = []
        started = time.perf_counter()
        with tempfile.TemporaryDirectory() as folder:
            for row in measure(case, args, Path(folder)):
                rows.append(row)
                shown = f"{row.case}  {row.value:g} {row.unit}  {row.note}"
                print(f"{time.perf_counter() - started:6.1f} s  {shown}", flush=True)
                write_result(f"h100_http_{case}", rows)


if __name__ == "__main__":
    main()
