"""Seconds from `outpace serve` to `/ready`: the first time, with nothing in the cache, and later.

    python benchmarks/start.py [--repeats 3]

Each start is a whole server process; the first one on an empty cache unpacks the embedded model and measures costs.
"""

from __future__ import annotations

import argparse
import os
import signal
import socket
import subprocess
import sys
import tempfile
import time
import urllib.error
import urllib.request
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from benchmarks.common import ROOT, median_row, write_result


def start_once(cache: str) -> tuple[float, bool]:
    """Seconds to a 200 of /ready, and whether the API process has torch loaded then."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    started = time.perf_counter()
    command = [sys.executable, "-m", "server", "serve", "--port", str(port)]
    server = subprocess.Popen(
        command,
        cwd=ROOT,
        env={**os.environ, "OUTPACE_CACHE": cache},
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    try:
        while server.poll() is None:
            try:
                with urllib.request.urlopen(f"http://127.0.0.1:{port}/ready", timeout=1):
                    seconds = time.perf_counter() - started
                    return seconds, "libtorch" in Path(f"/proc/{server.pid}/maps").read_text()
            except (urllib.error.URLError, TimeoutError):
                time.sleep(0.05)
        raise RuntimeError(f"the server ended with {server.returncode} before it was ready")
    finally:
        server.send_signal(signal.SIGTERM)
        server.wait(30)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeats", type=int, default=3)
    args = parser.parse_args()
    first: list[float] = []
    later: list[float] = []
    torch_seen = False
    for _ in range(args.repeats):
        with tempfile.TemporaryDirectory() as cache:
            for seconds in (first, later):
                took, has_torch = start_once(cache)
                seconds.append(took)
                torch_seen |= has_torch
    rows = [
        median_row("cpu2/start_s/smollm2/first", first, "s", "unpacks the model, compiles kernels, measures costs"),
        median_row("cpu2/start_s/smollm2/cached", later, "s", "target 10"),
        median_row("cpu2/start/api_process_has_torch", [float(torch_seen)], "bool", "target 0"),
    ]
    write_result("start", rows)


if __name__ == "__main__":
    main()
