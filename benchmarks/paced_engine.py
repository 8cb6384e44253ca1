"""A scripted engine whose requests each have a clock of their own: what every client should measure is known.

The first token of an answer comes FIRST_MS after the engine got the request, each further one STEP_MS later, whatever
others do. `python benchmarks/paced_engine.py --first-ms 100 --step-ms 25 ENDPOINT`, as a supervisor's program.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import msgspec

from benchmarks.scripted_engine import Running, ScriptedEngine
from server.config import EngineConfig
from server.core import StepOutput
from server.engine.kinds import FRAME
from server.engine.messages import EngineFrame
from server.engine.wire import Hub

IDLE_MS = 500.0


class PacedEngine(ScriptedEngine):
    """Admits whatever comes."""

    def __init__(self, config: EngineConfig, hub: Hub, first_s: float, step_s: float) -> None:
        super().__init__(config, hub, step_s)
        self.first_s = first_s
        self.due: dict[str, float] = {}
        """When each running request's next token is."""

    def run(self) -> None:
        while not self._stopping:
            now = time.perf_counter()
            while self.waiting:
                new = self.waiting.popleft()
                self.running[new.request.request_id] = new
                self.due[new.request.request_id] = now + self.first_s
            self.due = {name: at for name, at in self.due.items() if name in self.running}
            self._send([r for name, r in self.running.items() if not r.held and self.due[name] <= now])
            following = min((at for name, at in self.due.items() if name in self.running), default=None)
            wait_ms = IDLE_MS if following is None else 1e3 * (following - time.perf_counter())
            self._receive(wait_ms)

    def _send(self, ready: list[Running]) -> None:
        frames: dict[bytes, list[StepOutput]] = {}
        for running in ready:
            self.due[running.request.request_id] += self.step_s
            frames.setdefault(running.owner, []).append(self._emit(running))
        for owner, outputs in frames.items():
            self.hub.send(owner, FRAME, self._encode(EngineFrame(outputs, self._stats())))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--first-ms", type=float, default=100.0)
    parser.add_argument("--step-ms", type=float, default=25.0)
    parser.add_argument("endpoint")
    options = parser.parse_args()
    config = msgspec.json.decode(sys.stdin.buffer.read(), type=EngineConfig)
    hub = Hub(options.endpoint)
    print(json.dumps({"ready": True}), flush=True)
    PacedEngine(config, hub, options.first_ms / 1e3, options.step_ms / 1e3).run()
    hub.close()


if __name__ == "__main__":
    main()
