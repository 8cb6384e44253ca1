"""`outpace serve` as a process of its own, and what the operating system says of it."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Callable
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
PATIENCE_S = 100.0


class ServerProcess:
    """A server on any free port, ready when the constructor returns. Its output goes to `log`."""

    def __init__(self, model: Path, log: Path, *arguments: str) -> None:
        self._log = log
        command = [sys.executable, "-m", "server", "serve", str(model), "--port", "0", *arguments]
        with log.open("wb") as out:
            self._process = subprocess.Popen(
                command, cwd=ROOT, stdout=out, stderr=subprocess.STDOUT, env={**os.environ, "PYTHONUNBUFFERED": "1"}
            )
        self.pid = self._process.pid
        try:
            self.url = self._until(self._find_url, "it says where it listens")
            self._until(lambda: get(self.url, "/ready")[0] == 200, "it is ready")
        except BaseException:
            self.stop()
            raise

    @property
    def alive(self) -> bool:
        return self._process.poll() is None

    def output(self) -> str:
        """Everything it printed so far."""
        return self._log.read_text(errors="replace")

    def stop(self) -> int:
        """The exit status."""
        if self.alive:
            self._process.send_signal(signal.SIGTERM)
        try:
            return self._process.wait(PATIENCE_S)
        finally:
            self._process.kill()

    def _find_url(self) -> str | None:
        found = re.search(r"(http://[\w.:\[\]]+:\d+)", self.output())
        return found[1] if found else None

    def _until(self, condition: Callable[[], Any], what: str) -> Any:
        end = time.monotonic() + PATIENCE_S
        while not (found := condition()):
            if not self.alive or time.monotonic() > end:
                raise RuntimeError(f"waited in vain until {what}; it printed:\n{self.output()[-4000:]}")
            time.sleep(0.05)
        return found


def get(url: str, path: str) -> tuple[int, Any]:
    """Status and JSON; status 0 where nobody answers."""
    try:
        with urllib.request.urlopen(url + path, timeout=PATIENCE_S) as response:
            return response.status, json.load(response)
    except urllib.error.HTTPError as error:
        with error:
            return error.code, None
    except OSError:
        return 0, None


def open_files(pid: int) -> dict[int, int]:
    """Open file descriptors of the process and of everything it started, by process id."""
    counts: dict[int, int] = {}
    todo = [pid]
    while todo:
        pid = todo.pop()
        try:
            counts[pid] = len(list(Path(f"/proc/{pid}/fd").iterdir()))
            for task in Path(f"/proc/{pid}/task").iterdir():
                todo += map(int, (task / "children").read_text().split())
        except OSError:  # it has just ended
            counts.pop(pid, None)
    return counts
