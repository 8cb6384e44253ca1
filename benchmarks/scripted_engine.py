"""An engine that only speaks: one token a step for every running request, at a fixed pace. It loads no model.

For benchmarks and tests of the HTTP side: `Supervisor(program=(this file, "--step-ms", "5"))`.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections import deque
from dataclasses import dataclass

import msgspec

from server.config import EngineConfig
from server.core import FinishReason, Request, StepOutput
from server.engine.kinds import ABORT, FRAME, GONE, HELLO, HOLD, INFO, PING, PONG, RESUME, STOP, SUBMIT
from server.engine.messages import EngineFrame, EngineInfo, EngineStats
from server.engine.wire import Hub

VOCABULARY = range(1000, 6000)


@dataclass
class Running:
    """One request at work."""

    owner: bytes
    request: Request
    num_emitted: int = 0
    held: bool = False


class ScriptedEngine:
    """Admits up to `max_num_seqs` requests; token i of an answer is always the same."""

    def __init__(self, config: EngineConfig, hub: Hub, step_s: float) -> None:
        self.config, self.hub, self.step_s = config, hub, step_s
        self.num_slots = config.max_num_seqs or 16
        self.running: dict[str, Running] = {}
        self.waiting: deque[Running] = deque()
        self.num_steps = 0
        self._encode = msgspec.msgpack.Encoder().encode
        self._decode = msgspec.msgpack.Decoder(Request).decode
        self._stopping = False

    def run(self) -> None:
        deadline = time.perf_counter()
        while not self._stopping:
            now = time.perf_counter()
            if not self.running and not self.waiting:
                self._receive(500.0)
                deadline = time.perf_counter() + self.step_s
            elif now < deadline:
                self._receive((deadline - now) * 1e3)
            else:
                self._step()
                deadline = max(deadline + self.step_s, time.perf_counter())
                self._receive(0.0)

    def _receive(self, wait_ms: float) -> None:
        if self.hub.poll(max(0.0, wait_ms)):
            for identity, kind, payload in self.hub.receive():
                self._handle(identity, kind, payload)

    def _handle(self, identity: bytes, kind: bytes, payload: bytes) -> None:
        if kind == SUBMIT:
            self.waiting.append(Running(identity, self._decode(payload)))
        elif kind == ABORT:
            self.running.pop(payload.decode(), None)
            self.waiting = deque(r for r in self.waiting if r.request.request_id != payload.decode())
        elif kind in (HOLD, RESUME):
            if (held := self.running.get(payload.decode())) is not None:
                held.held = kind == HOLD
        elif kind == GONE:
            self.running = {i: r for i, r in self.running.items() if r.owner != identity}
        elif kind == HELLO:
            self.hub.send(identity, INFO, self._encode(self._info()))
        elif kind == PING:
            self.hub.send(identity, PONG, self._encode(self._stats()))
        elif kind == STOP:
            self._stopping = True

    def _step(self) -> None:
        active = [r for r in self.running.values() if not r.held]
        while self.waiting and len(active) < self.num_slots:
            new = self.waiting.popleft()
            self.running[new.request.request_id] = new
            active.append(new)
        self.num_steps += 1
        frames: dict[bytes, list[StepOutput]] = {}
        for running in active:
            frames.setdefault(running.owner, []).append(self._emit(running))
        stats = self._stats()
        for owner, outputs in frames.items():
            self.hub.send(owner, FRAME, self._encode(EngineFrame(outputs, stats)))

    def _emit(self, running: Running) -> StepOutput:
        request = running.request
        token = VOCABULARY[running.num_emitted % len(VOCABULARY)]
        running.num_emitted += 1
        ends = running.num_emitted >= request.max_tokens
        if ends:
            del self.running[request.request_id]
        cached = 0 if running.num_emitted == 1 else None
        return StepOutput(
            request.request_id, [token], finish_reason=FinishReason.LENGTH if ends else None, num_cached=cached
        )

    def _stats(self) -> EngineStats:
        num_held = sum(r.held for r in self.running.values())
        return EngineStats(
            num_running=len(self.running) - num_held,
            num_waiting=len(self.waiting),
            num_held=num_held,
            num_steps=self.num_steps,
        )

    def _info(self) -> EngineInfo:
        return EngineInfo(
            model=self.config.model,
            architecture="Scripted",
            num_parameters=0,
            dtype="none",
            device="none",
            max_model_len=8192,
            vocab_size=49152,
            kv_cache_tokens=1 << 30,
            kv_cache_bytes=0,
            max_num_seqs=self.num_slots,
            max_num_batched_tokens=1,
            drafter="none",
            max_draft_tokens=0,
            verification="coupled",
            linear_path="none",
            num_threads=1,
            load_s=0.0,
        )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--step-ms", type=float, default=5.0)
    parser.add_argument("endpoint")
    options = parser.parse_args()
    config = msgspec.json.decode(sys.stdin.buffer.read(), type=EngineConfig)
    hub = Hub(options.endpoint)
    print(json.dumps({"ready": True}), flush=True)
    ScriptedEngine(config, hub, options.step_ms / 1e3).run()
    hub.close()


if __name__ == "__main__":
    main()
