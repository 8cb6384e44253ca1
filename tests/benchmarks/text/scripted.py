"""An engine that says what a test wrote down."""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass, field
from types import SimpleNamespace
from typing import Any

from server.core import FinishReason, Request, StepOutput

Step = tuple[list[int], int, int]
"""Tokens, drafted, accepted."""


@dataclass
class ScriptedEngine:
    """Each request has a list of steps, of which it takes one whenever the engine steps."""

    scripts: dict[str, list[Step]]
    running: dict[str, deque[Step]] = field(default_factory=dict)
    preemptions: int = 0
    most: int = 0
    aborted: list[str] = field(default_factory=list)

    def submit(self, request: Request) -> StepOutput | None:
        self.running[request.request_id] = deque(self.scripts[request.request_id])
        self.most = max(self.most, len(self.running))
        return None

    @property
    def has_work(self) -> bool:
        return bool(self.running)

    def step(self) -> list[StepOutput]:
        outputs = []
        for name, script in list(self.running.items()):
            tokens, drafted, accepted = script.popleft()
            reason = None if script else FinishReason.STOP
            if reason is not None:
                del self.running[name]
            outputs.append(StepOutput(name, tokens, None, reason, drafted, accepted))
        return outputs

    def abort(self, name: str) -> None:
        del self.running[name]
        self.aborted.append(name)

    def check_integrity(self) -> None:
        assert not self.running

    def stats(self) -> Any:
        return SimpleNamespace(num_preemptions=self.preemptions)
