"""Runs a stage of a build in a child process. No torch."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from collections.abc import Callable
from dataclasses import asdict
from importlib import metadata
from pathlib import Path
from typing import Any

from optimize.errors import OptimizeError
from optimize.ptq.job import Job
from server.engine.environment import engine_environment

MODELOPT = "0.47.0"
NEEDED = {"nvidia-modelopt": MODELOPT, "requests": None, "huggingface-hub": None, "accelerate": None}
_TAIL = 5
Show = Callable[[str, float], None]
Say = Callable[[str], None]
RunStage = Callable[[str, Job, Show, Say], Any]


def require_libraries() -> None:
    """Raises OptimizeError saying what to install."""
    for name, wanted in NEEDED.items():
        try:
            found = metadata.version(name)
        except metadata.PackageNotFoundError:
            found = None
        if found is None or (wanted is not None and found != wanted):
            have = "is not installed" if found is None else f"is {found}, not {wanted}"
            raise OptimizeError(f"{name} {have}; install what optimising needs with `pip install 'outpace[optimize]'`")


class ChildStages:
    """Each stage in a process of its own; `log` receives what libraries print."""

    def __init__(self, log: Path, nice: int = 0) -> None:
        self._log, self._nice = log, nice

    def __call__(self, stage: str, job: Job, show: Show, say: Say) -> Any:
        """The stage's result. Raises OptimizeError with the reason why there is none."""
        with self._log.open("a") as log:
            child = subprocess.Popen(
                [sys.executable, "-P", "-m", "optimize.ptq.process", stage],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=log,
                text=True,
                env=self._environment(),
                preexec_fn=self._lower_priority if self._nice else None,
            )
            try:
                return self._follow(child, stage, job, show, say)
            finally:
                if child.poll() is None:
                    child.kill()
                child.wait()

    def _follow(self, child: subprocess.Popen[str], stage: str, job: Job, show: Show, say: Say) -> Any:
        assert child.stdin is not None and child.stdout is not None
        content = asdict(job)
        with child.stdin as stream:
            stream.write(json.dumps(content))
        failure: str | None = None
        with child.stdout as lines:
            for line in lines:
                message = json.loads(line)
                if "progress" in message:
                    show(*message["progress"])
                elif "say" in message:
                    say(message["say"])
                elif "result" in message:
                    return message["result"]
                else:
                    failure = message["failure"]
        status = child.wait()
        raise OptimizeError(f"{stage}: {failure or self._why(status)}")

    def _why(self, status: int) -> str:
        if status == -signal.SIGKILL:
            return (
                "the process was killed, most likely because memory ran out; use a smaller calibration.batch, "
                "--device-map auto, or a machine with more memory"
            )
        tail = " | ".join(self._log.read_text(errors="replace").strip().splitlines()[-_TAIL:])
        return f"the process ended with status {status}: {tail}"

    def _lower_priority(self) -> None:
        os.nice(self._nice)

    @staticmethod
    def _environment() -> dict[str, str]:
        """The child imports the same packages, wherever it is run from."""
        found = {**engine_environment(), "TOKENIZERS_PARALLELISM": "false", "HF_HUB_DISABLE_PROGRESS_BARS": "1"}
        root = str(Path(__file__).resolve().parents[1])
        found["PYTHONPATH"] = os.pathsep.join(p for p in (root, found.get("PYTHONPATH", "")) if p)
        return found
