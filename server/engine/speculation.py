"""How much to draft: keeps acceptance and costs current and asks the policy. Host only."""

from __future__ import annotations

from server.engine.runner import StepResult
from server.spec.acceptance import AcceptanceTracker
from server.spec.cost_table import CostTable
from server.spec.types import Carry, Drafts


class Speculation:
    """Draft-length control of one engine. Without a cost table every step drafts `max_draft_tokens`."""

    def __init__(self, costs: CostTable | None, max_draft_tokens: int) -> None:
        self.costs = costs
        self.max_draft_tokens = max_draft_tokens
        self.acceptance = AcceptanceTracker()
        self.num_draft_steps = 0
        self.drafted_per_position = [0] * max_draft_tokens
        self.accepted_per_position = [0] * max_draft_tokens
        self.paused = False

    def num_draft_tokens(self, num_rows: int) -> int:
        return self.max_draft_tokens

    def trim(self, drafts: Drafts, carry: Carry) -> Drafts:
        return drafts

    def record(self, result: StepResult, context: int, elapsed_ms: float) -> None:
        """Learns from a verify step: what was accepted, what it cost."""
        if any(result.num_drafted):
            self.num_draft_steps += 1
        for drafted, accepted in zip(result.num_drafted, result.num_accepted, strict=True):
            for j in range(drafted):
                self.drafted_per_position[j] += 1
            for j in range(accepted):
                self.accepted_per_position[j] += 1
