"""A paced engine whose requests differ, some of which go wrong: what an experiment is to find in a candidate.

Each request's time to the first token and its pace are FIRST_MS and STEP_MS times a log-normal factor, both times
`--factor`; a share `--tail-share` of them takes `--tail-factor` times as long again; `--errors` fail at their first
token, `--garbled` say one token for ever. `python benchmarks/ab/flawed_engine.py [options] ENDPOINT`, as a supervisor's
program.
"""

from __future__ import annotations

import argparse
import json
import random
import sys
import time
from dataclasses import dataclass
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent.parent))

import msgspec

from benchmarks.paced_engine import PacedEngine
from benchmarks.scripted_engine import Running
from server.config import EngineConfig
from server.core import FinishReason, StepOutput
from server.engine.wire import Hub

SPREAD = 0.25
"""Standard deviation of the logarithm of a request's own pace."""


@dataclass
class Flaws:
    """Shares of requests, and factors on their times."""

    factor: float = 1.0
    tail_share: float = 0.0
    tail_factor: float = 1.0
    errors: float = 0.0
    garbled: float = 0.0


class FlawedEngine(PacedEngine):
    """Draws each request's fate when it arrives."""

    def __init__(self, config: EngineConfig, hub: Hub, first_s: float, step_s: float, flaws: Flaws) -> None:
        super().__init__(config, hub, first_s, step_s)
        self.flaws = flaws
        self.rng = random.Random()
        self.pace: dict[str, float] = {}
        self.failing: set[str] = set()
        self.stuck: set[str] = set()

    def _take(self, new: Running, now: float) -> None:
        name, flaws = new.request.request_id, self.flaws
        pace = self.rng.lognormvariate(0.0, SPREAD) * flaws.factor
        if self.rng.random() < flaws.tail_share:
            pace *= flaws.tail_factor
        if self.rng.random() < flaws.errors:
            self.failing.add(name)
        if self.rng.random() < flaws.garbled:
            self.stuck.add(name)
        self.pace[name] = pace
        self.running[name] = new
        self.due[name] = now + self.first_s * pace

    def run(self) -> None:
        """Until it is told to stop."""
        while not self._stopping:
            now = time.perf_counter()
            while self.waiting:
                self._take(self.waiting.popleft(), now)
            for gone in self.pace.keys() - self.running.keys():
                self.failing.discard(gone)
                self.stuck.discard(gone)
                del self.pace[gone]
            self.due = {name: at for name, at in self.due.items() if name in self.running}
            self._send([r for name, r in self.running.items() if not r.held and self.due[name] <= now])
            following = min(self.due.values(), default=now + 0.5)
            self._receive(1e3 * (following - time.perf_counter()))

    def _emit(self, running: Running) -> StepOutput:
        name = running.request.request_id
        self.due[name] += self.step_s * (self.pace[name] - 1)  # the paced engine adds one step's time
        if name in self.failing:
            del self.running[name]
            return StepOutput(name, [], finish_reason=FinishReason.ERROR, error="injected")
        output = super()._emit(running)
        return msgspec.structs.replace(output, token_ids=[1000]) if name in self.stuck else output


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--first-ms", type=float, default=60.0)
    parser.add_argument("--step-ms", type=float, default=20.0)
    for name, value in vars(Flaws()).items():
        parser.add_argument("--" + name.replace("_", "-"), type=float, default=value)
    parser.add_argument("endpoint")
    options = parser.parse_args()
    flaws = Flaws(**{name: getattr(options, name) for name in vars(Flaws())})
    config = msgspec.json.decode(sys.stdin.buffer.read(), type=EngineConfig)
    hub = Hub(options.endpoint)
    print(json.dumps({"ready": True}), flush=True)
    FlawedEngine(config, hub, options.first_ms / 1e3, options.step_ms / 1e3, flaws).run()
    hub.close()


if __name__ == "__main__":
    main()
