"""`python -m optimize.ptq.process STAGE`: one stage of a build in a process of its own, whose memory ends with it.

The job arrives as JSON on standard input. Lines of JSON on standard output say how far it is (`progress`), what there
is to tell (`say`), and at last the `result` or the `failure`; whatever libraries print goes to standard error.
"""

from __future__ import annotations

import json
import os
import sys
import traceback
from collections.abc import Callable
from typing import Any

from optimize.errors import OptimizeError
from optimize.ptq.job import Job
from server.engine.child import belong_to_parent


class Report:
    """Writes the lines."""

    def __init__(self) -> None:
        self._out = os.fdopen(os.dup(1), "w")
        os.dup2(2, 1)
        self._last: tuple[str, int] | None = None

    def progress(self, what: str, fraction: float) -> None:
        """At most one line a per mille."""
        if self._last != (what, int(fraction * 1000)):
            self._last = (what, int(fraction * 1000))
            self.send({"progress": [what, fraction]})

    def say(self, text: str) -> None:
        """One line for the user."""
        self.send({"say": text})

    def send(self, message: dict[str, Any]) -> None:
        print(json.dumps(message), file=self._out, flush=True)


def main() -> int:
    """0, or 1 with the failure told."""
    belong_to_parent()  # a killed build must not go on beside the one that takes its place
    report = Report()
    stage, job = sys.argv[1], Job(**json.loads(sys.stdin.read()))
    try:
        report.send({"result": _stage(stage)(job, report)})
    except Exception as error:  # noqa: BLE001 - told to the parent, which is who can tell the user
        expected = isinstance(error, (OptimizeError, ValueError, OSError, RuntimeError))
        traceback.print_exc()
        words = str(error) if expected and str(error) else f"{type(error).__name__}: {error}"
        report.send({"failure": words[:2000]})
        return 1
    return 0


def _stage(name: str) -> Callable[[Job, Report], Any]:
    from optimize.ptq import stages  # loads torch

    known = (stages.texts, stages.choose, stages.quantize, stages.check, stages.gate)
    return next(stage for stage in known if stage.__name__ == name)


if __name__ == "__main__":
    sys.exit(main())
