"""What the engine asks of whatever owns the device, and the sizes of what it owns."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

from draft_models.protocol import Drafter
from server.core import StepPlan
from server.engine.result import LaunchedStep
from server.engine.sequence import Sequence
from server.models.base import TargetModel


@dataclass(frozen=True, slots=True)
class RunnerShape:
    """Sizes of the per-slot state and the KV pool. `ragged` None picks by device."""

    max_num_seqs: int
    max_model_len: int
    max_draft_tokens: int
    block_size: int
    num_blocks: int
    rule: str = "coupled"
    ragged: bool | None = None


class StepRunner(Protocol):
    """What the engine asks of whatever owns the device."""

    model: TargetModel
    shape: RunnerShape
    overlaps: bool
    """Whether a step may be launched before the last one is read."""

    @property
    def linear_path(self) -> str:
        """How linear layers compute."""

    @property
    def drafter(self) -> Drafter | None:
        """Who drafts, if anybody does."""

    @property
    def num_graph_misses(self) -> int:
        """Halves of steps that ran eagerly for want of a captured graph."""

    def admit(self, sequences: list[Sequence]) -> None:
        """Each of `sequences` took a slot."""

    def release(self, slot: int, complete: bool = False) -> None:
        """The slot is free; `complete`: its owner's answer came to its natural end."""

    def scrub(self, blocks: list[int]) -> None:
        """Zeroes blocks that may hold values which are not finite."""

    def launch(self, plan: StepPlan, sequences: list[Sequence]) -> LaunchedStep:
        """Starts `plan`; `sequences` are its rows' owners. The host state is not touched."""
