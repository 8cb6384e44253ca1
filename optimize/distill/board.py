"""Curves for TensorBoard, where they are asked for."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from optimize.distill.evaluate import Acceptance
from optimize.distill.train import Progress
from server.config import ConfigError


class Board:
    """Writes to `directory`; None: nowhere. Raises ConfigError where the package is missing."""

    def __init__(self, directory: Path | None) -> None:
        self._writer: Any = None
        if directory is None:
            return
        try:
            from torch.utils.tensorboard import SummaryWriter
        except ImportError as error:
            raise ConfigError(
                f"tensorboard: {str(directory)!r} cannot be written without the package tensorboard; "
                f"pip install 'outpace[distill]' ({error})"
            ) from error
        self._writer = SummaryWriter(directory)

    def scalar(self, name: str, value: float, step: int) -> None:
        """One point of a curve; `step` counts updates."""
        if self._writer is not None:
            self._writer.add_scalar(name, value, step)

    def progress(self, p: Progress, tokens_per_s: float) -> None:
        """What the progress line says."""
        self.scalar("training/loss", p.loss, p.step)
        self.scalar("training/learning rate", p.learning_rate, p.step)
        self.scalar("training/tokens per second", tokens_per_s, p.step)
        for i, share in enumerate(p.agreement):
            self.scalar(f"training/top-1 of draft {i + 1}", share, p.step)

    def acceptance(self, step: int, result: Acceptance) -> None:
        """What the tables say."""
        text = "greedy" if result.temperature == 0.0 else f"temperature {result.temperature:g}"
        self.scalar(f"held out, {text}/tokens per step", result.emitted_per_step, step)
        for i, share in enumerate(result.conditional):
            self.scalar(f"held out, {text}/acceptance of draft {i + 1}", share, step)

    def close(self) -> None:
        """Writes what is left."""
        if self._writer is not None:
            self._writer.close()
