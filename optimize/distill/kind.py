"""What the run asks of a kind of drafter."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Protocol

from optimize.distill.export import Card
from optimize.distill.gather import Texts
from optimize.distill.options import DistillOptions
from optimize.distill.student import Student


class Kind(Protocol):
    """How one kind of drafter is made for one target. Making the object checks what the target's shape must allow."""

    def student(self, texts: Texts, max_positions: int) -> Student:
        """Loads the target and the drafter before training, for positions below `max_positions`."""

    def settings(self) -> dict[str, Any]:
        """Fields of TrainSettings that only this kind knows, once there is a student."""

    def words(self) -> str:
        """What the model card says of the loss."""

    def export(self, out: Path, card: Card) -> None:
        """Writes the student as it is."""


def max_file_bytes(options: DistillOptions) -> int | None:
    """Most bytes of a safetensors file, None for any number."""
    return None if options.max_shard_mb is None else options.max_shard_mb * 1_000_000
