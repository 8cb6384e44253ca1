"""A reference server of known latencies, in a process of its own, and runs against it."""

from __future__ import annotations

import json
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import uvloop

from loadtest.distribution import constant
from loadtest.measure import Seen
from loadtest.plan import Server, job_of
from loadtest.processes import generate
from loadtest.settings import Asked, Load, Settings, Target

SCRIPT = Path(__file__).with_name("reference_server.py")


class Reference:
    """The server's address, its script and its log."""

    def __init__(self, port: int) -> None:
        self.url = f"http://127.0.0.1:{port}"

    def script(self, **fields: Any) -> None:
        """What is streamed from now on; forgets the log."""
        request = urllib.request.Request(f"{self.url}/script", json.dumps(fields).encode(), method="POST")
        urllib.request.urlopen(request).read()

    def log(self) -> list[list[float]]:
        """When the chunks of each request were sent, seconds on the machine's monotonic clock."""
        with urllib.request.urlopen(f"{self.url}/log") as answer:
            found: list[list[float]] = json.loads(answer.read())
        return found

    def run(self, load: Load, num_tokens: int = 4, *, way: str = "usage", **asked: Any) -> tuple[Seen, float]:
        """One run in this process; also when it began on the monotonic clock."""
        wanted = Asked(input_tokens=constant(20), output_tokens=constant(num_tokens), **asked)
        settings = Settings(Target(self.url, timeout_s=20.0), load, wanted)
        job = job_of(settings, Server("reference", way), 0)
        start = time.monotonic() + 0.05
        records, health = uvloop.run(generate(job, start, lambda progress: None))
        records.sort(key=lambda record: record.intended)
        return Seen(records, [health]), start


@pytest.fixture(scope="session")
def server() -> Iterator[Reference]:
    """One for the session: each test scripts it anew."""
    with subprocess.Popen([sys.executable, str(SCRIPT), "0"], stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        try:
            yield Reference(int(process.stdout.readline()))
        finally:
            process.terminate()
