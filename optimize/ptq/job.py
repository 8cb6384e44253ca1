"""What a stage of a build is told. Crosses a process boundary as JSON. No torch."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from optimize.recipe import Recipe
from optimize.recipe_file import parse_recipe

TEXTS, CHOICE, CHECK = "calibration.safetensors", "choice.json", "check.json"


@dataclass(frozen=True)
class Job:
    """`model` as the user named it; `content` becomes the artifact, `work` keeps what stages hand each other.

    `text` is a user's JSONL file. `dtype` is what the network is calibrated in; `device_map` is accelerate's.
    """

    model: str
    recipe_fields: dict[str, Any]
    content: str
    work: str
    text: str | None = None
    device: str = "auto"
    device_map: str | None = None
    dtype: str = "auto"

    @cached_property
    def recipe(self) -> Recipe:
        """The recipe of `recipe_fields`."""
        return parse_recipe(self.recipe_fields)

    @property
    def texts(self) -> Path:
        """Rows of token ids to calibrate on."""
        return Path(self.work) / TEXTS
