"""What a build asks of the gate (`optimize.evaluate.gate`). No torch."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Protocol

from optimize.recipe import Recipe


class Verdict(Protocol):
    """Whether the candidate may be served; if not, `reasons` say which number failed and what to try instead."""

    @property
    def passed(self) -> bool: ...

    @property
    def reasons(self) -> Sequence[str]: ...


class Gate(Protocol):
    """Holds a candidate's directory against the model that it was made from, at the recipe's thresholds."""

    def check(self, base: str, candidate: Path, recipe: Recipe) -> Verdict: ...
