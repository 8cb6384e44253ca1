"""`outpace serve` before engines that only speak: `cost_server.py STEP_MS MODE [options of outpace serve]`.

MODE is `unmeasured` (requests, steps and answers are not counted or timed) or `measured` (as shipped).
"""

from __future__ import annotations

import argparse
import asyncio
import logging
import sys
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent.parent))

from benchmarks.scripted_server import serve
from server.api.event_loop import loop_factory
from server.cli_options import add_options, parse_config
from server.core import FinishReason
from server.telemetry import arm_metrics
from server.telemetry.metrics import Metrics


class Untimed(arm_metrics.ChoiceTimer):
    """Knows how a choice ended and nothing else."""

    __slots__ = ()

    def started(self) -> None:
        pass

    def observe_step(self, num_tokens: int) -> None:
        pass

    def finish(self, reason: FinishReason, num_completion_tokens: int) -> None:
        self.reason = reason


def measure_nothing() -> None:
    """Replaces what every request, step and answer passes through."""

    def nothing(*_: Any) -> None:
        pass

    patched: dict[str, Any] = {"ChoiceTimer": Untimed}
    vars(arm_metrics).update(patched)
    for owner, name in ((arm_metrics.ArmMetrics, "admitted"), (Metrics, "count_answer"), (Metrics, "on_stats")):
        setattr(owner, name, nothing)


def main() -> None:
    step_ms, mode, *options = sys.argv[1:]
    if mode == "unmeasured":
        measure_nothing()
    parser = argparse.ArgumentParser()
    add_options(parser)
    config = parse_config(parser.parse_args(options))
    logging.basicConfig(level=config.log_level.upper())
    with asyncio.Runner(loop_factory=loop_factory()) as runner:
        runner.run(serve(config, step_ms))


if __name__ == "__main__":
    main()
