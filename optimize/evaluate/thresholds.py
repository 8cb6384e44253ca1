"""What a candidate must pass, and what a recipe says of it. No torch."""

from __future__ import annotations

import math
import tomllib
from collections.abc import Mapping
from dataclasses import dataclass, field, fields, replace
from pathlib import Path
from typing import Any

from server.config import ConfigError

RECIPES = Path(__file__).resolve().parent.parent / "recipes"


@dataclass(frozen=True, slots=True)
class Thresholds:
    """Bounds of the numbers that a candidate is judged by.

    Numbers that text decides are judged by the unfavourable end of their one-sided interval at `confidence`.
    `faster_at`: numbers of sequences at which a decoding step must take less time than the original's.
    `min_acceptance_ratio`: share of drafts accepted, as a multiple of the original's, where there is a drafter.
    `min_tokens`: how much text is enough to judge by.
    """

    max_perplexity_ratio: float = 1.03
    min_top1_agreement: float = 0.95
    faster_at: tuple[int, ...] = ()
    min_acceptance_ratio: float = 0.9
    min_tokens: int = 50_000
    confidence: float = 0.95

    def __post_init__(self) -> None:
        for name in ("max_perplexity_ratio", "min_top1_agreement", "min_acceptance_ratio", "confidence"):
            value: object = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, (int, float)) or not math.isfinite(value):
                raise ConfigError(f"{name}: {value!r} is not valid; use a number")
        if self.max_perplexity_ratio <= 0:
            raise ConfigError(f"max_perplexity_ratio: {self.max_perplexity_ratio!r} is not valid; use more than 0")
        _share("min_top1_agreement", self.min_top1_agreement)
        if self.min_acceptance_ratio < 0:
            raise ConfigError(f"min_acceptance_ratio: {self.min_acceptance_ratio!r} is not valid; use 0 or more")
        if not 0.5 <= self.confidence < 1:
            raise ConfigError(f"confidence: {self.confidence!r} is not valid; use 0.5 or more and less than 1")
        counts: list[tuple[str, object]] = [
            ("min_tokens", self.min_tokens),
            *(("faster_at", t) for t in self.faster_at),
        ]
        for name, count in counts:
            if isinstance(count, bool) or not isinstance(count, int) or count < 1:
                raise ConfigError(f"{name}: {count!r} is not valid; use a whole number of 1 or more")

    @staticmethod
    def of(settings: object) -> Thresholds:
        """Those that an object has as attributes of the same names, and the defaults. Raises ConfigError."""
        known = [f.name for f in fields(Thresholds)]
        return Thresholds(**{name: getattr(settings, name) for name in known if hasattr(settings, name)})


@dataclass(frozen=True, slots=True)
class RecipeFacts:
    """What advice needs to know of the recipe that made a candidate. Fields as in a recipe's file; None: not known."""

    name: str = ""
    method: str | None = None
    weights: str | None = None
    activations: str | None = None
    group_size: int | None = None
    minimum: bool = False
    gate: Thresholds = field(default_factory=Thresholds)

    @staticmethod
    def of(recipe: object) -> RecipeFacts:
        """Of a recipe with these attributes, or of thresholds alone. Raises ConfigError."""
        names = ("name", "method", "weights", "activations", "group_size", "minimum")
        found = {name: getattr(recipe, name) for name in names if hasattr(recipe, name)}
        return RecipeFacts(**found, gate=Thresholds.of(getattr(recipe, "gate", recipe)))


def read_recipe(spec: str) -> RecipeFacts:
    """Of a recipe by name (`optimize/recipes/`) or a TOML file; only what belongs to the gate is checked.

    Raises ConfigError naming the field and what would be valid.
    """
    path = RECIPES / f"{spec}.toml"
    if not path.is_file():
        path = Path(spec).expanduser()
        if path.suffix != ".toml" or not path.is_file():
            names = ", ".join(sorted(p.stem for p in RECIPES.glob("*.toml")))
            known = f"one of {names}, or an existing .toml file" if names else "an existing .toml file"
            raise ConfigError(f"recipe: {spec!r} is not valid; use {known}")
    try:
        content = tomllib.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ConfigError(f"{path}: cannot be read as TOML: {error}") from error
    try:
        return _facts(path.stem, content)
    except ConfigError as error:
        raise ConfigError(f"{path.name}: {error}") from None


def _facts(name: str, content: Mapping[str, Any]) -> RecipeFacts:
    gate = content.get("gate", {})
    if not isinstance(gate, dict):
        raise ConfigError(f"gate: {gate!r} is not valid; use a table")
    known = [f.name for f in fields(Thresholds)]
    unknown = sorted(set(gate) - set(known))
    if unknown:
        raise ConfigError(f"gate.{unknown[0]}: there is no such field; valid fields are {', '.join(known)}")
    tiers = gate.get("faster_at", [])
    values = {**gate, "faster_at": tuple(tiers) if isinstance(tiers, list) else (tiers,)}
    try:
        thresholds = Thresholds(**values)
    except ConfigError as error:
        raise ConfigError(f"gate.{error}") from None
    wanted = {f.name for f in fields(RecipeFacts)} - {"gate"}
    return replace(
        RecipeFacts(name=name, gate=thresholds), **{key: value for key, value in content.items() if key in wanted}
    )


def _share(name: str, value: float) -> None:
    if not 0 <= value <= 1:
        raise ConfigError(f"{name}: {value!r} is not valid; use 0 to 1")
