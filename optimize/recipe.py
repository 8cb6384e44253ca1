"""What to do to a model: formats of its layers, how they are calibrated, and what the result must pass. No torch.

A recipe is a TOML file (`optimize/recipes/`, or a user's own); its fields are those of the classes here. Everything is
checked when it is read, and an error names the field, the value and the valid values.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field, replace
from fnmatch import fnmatchcase

from server.config import ConfigError

METHODS = ("max", "smoothquant", "awq", "auto")
"""max: scales from the largest magnitude. smoothquant: Xiao et al. 2022 (arXiv 2211.10438). awq: Lin et al. 2023
(arXiv 2306.00978). auto: formats chosen a layer under a budget of bits."""
WEIGHTS = ("fp8", "int8", "int4")
ACTIVATIONS = ("none", "fp8", "int8", "int8-group")
AXES = ("row", "group")
KV_CACHES = ("auto", "fp8")
DTYPES = ("source", "float32", "bfloat16", "float16")
SOURCES = ("self", "file", "both")
SEARCHES = ("gradient", "kl_div")
GROUP_SIZES = (16, 32, 64, 128, 256)
ALWAYS_KEPT = ("lm_head", "model.embed_tokens")
"""Kept in high precision unless a `[[layers]]` entry has exactly this name; its wildcards do not reach them."""


def one_of(name: str, value: object, valid: tuple[object, ...]) -> None:
    """Raises ConfigError unless it is."""
    if value not in valid:
        raise ConfigError(f"{name}: {value!r} is not valid; use one of {', '.join(map(str, valid))}")


def within(name: str, value: float, low: float, high: float) -> None:
    """Raises ConfigError unless it is."""
    if not low <= value <= high:
        raise ConfigError(f"{name}: {value!r} is not valid; use {low:g} to {high:g}")


@dataclass(frozen=True, slots=True)
class LayerFormat:
    """A `server.quant.formats.LinearFormat` before the layer's factors are known. `group_size` None: a scale a row."""

    weights: str
    activations: str = "none"
    group_size: int | None = None
    minimum: bool = False

    def __post_init__(self) -> None:
        one_of("weights", self.weights, WEIGHTS)
        one_of("activations", self.activations, ACTIVATIONS)
        if self.group_size is not None:
            one_of("group_size", self.group_size, GROUP_SIZES)
        if self.activations == "int8-group" and self.group_size is None:
            raise ConfigError("group_size: missing; activations 'int8-group' need one")
        if self.weights == "fp8" and self.minimum:
            raise ConfigError("minimum: true is not valid for fp8 weights; use false")

    @property
    def bits(self) -> int:
        """Of a stored weight, scales apart."""
        return 4 if self.weights == "int4" else 8


@dataclass(frozen=True, slots=True)
class LayerRule:
    """What layers whose name matches `pattern` (fnmatch) have instead; the last rule that matches wins.

    `keep`: high precision. `axis` "row" takes an inherited group size away. Other fields left None are the recipe's.
    """

    pattern: str
    keep: bool = False
    weights: str | None = None
    activations: str | None = None
    group_size: int | None = None
    axis: str | None = None
    minimum: bool | None = None

    def __post_init__(self) -> None:
        if not self.pattern:
            raise ConfigError("pattern: '' is not valid; use a layer's name, with * for any characters")
        changes = (self.weights, self.activations, self.group_size, self.axis, self.minimum)
        if self.keep and any(change is not None for change in changes):
            raise ConfigError("keep: true is not valid beside a format; use one or the other")
        if self.weights is not None:
            one_of("weights", self.weights, WEIGHTS)
        if self.axis is not None:
            one_of("axis", self.axis, AXES)
        if self.axis == "row" and self.group_size is not None:
            raise ConfigError(f"group_size: {self.group_size} is not valid with axis 'row'; leave it out")

    def applied(self, base: LayerFormat) -> LayerFormat:
        """`base` with the rule's fields. Raises ConfigError where they do not fit each other."""
        changes = {
            name: value
            for name in ("weights", "activations", "group_size", "minimum")
            if (value := getattr(self, name)) is not None
        }
        if self.axis == "row":
            changes["group_size"] = None
        result = replace(base, **changes)
        if self.axis == "group" and result.group_size is None:
            raise ConfigError("group_size: missing; axis 'group' needs one")
        return result


@dataclass(frozen=True, slots=True)
class Smoothing:
    """SmoothQuant's migration strength: one α, or several to choose from by the loss on held-out calibration text."""

    alpha: tuple[float, ...] = (0.5, 0.6, 0.7, 0.8)

    def __post_init__(self) -> None:
        if not self.alpha:
            raise ConfigError("alpha: [] is not valid; use a number from 0 to 1 or several")
        for alpha in self.alpha:
            within("alpha", alpha, 0.0, 1.0)


@dataclass(frozen=True, slots=True)
class AutoSearch:
    """Mixed precision: a format of `candidates` for each layer, on average at most `bits` a weight.

    Layers that stay in high precision are not counted. `search` is how sensitivity is scored: from gradients of the
    loss, or from the KL divergence of the outputs (slower). `score_steps` batches are scored.
    """

    bits: float = 6.0
    candidates: tuple[LayerFormat, ...] = (LayerFormat("int4", group_size=32, minimum=True), LayerFormat("int8"))
    search: str = "gradient"
    score_steps: int = 16

    def __post_init__(self) -> None:
        one_of("search", self.search, SEARCHES)
        within("score_steps", self.score_steps, 1, 4096)
        if len(self.candidates) < 2:
            raise ConfigError(f"candidates: {len(self.candidates)} is not valid; use two or more")
        lowest = min(candidate.bits for candidate in self.candidates)
        if not lowest < self.bits <= 16:
            raise ConfigError(f"bits: {self.bits!r} is not valid; use more than {lowest} (the candidates'), at most 16")


@dataclass(frozen=True, slots=True)
class CalibrationSettings:
    """Text to calibrate on: written by the target itself, a file's, or both; rows of `sequence` tokens.

    `tokens` in all (None: 16,384, on a CPU 4,096, where it writes slowly), of which `held_out_share` only judge.
    `batch` rows go through the network at once; where memory runs out, half as many.
    """

    source: str = "self"
    tokens: int | None = None
    sequence: int = 256
    held_out_share: float = 0.125
    batch: int = 8
    seed: int = 0

    def __post_init__(self) -> None:
        one_of("source", self.source, SOURCES)
        within("sequence", self.sequence, 32, 131_072)
        if self.tokens is not None:
            within("tokens", self.tokens, 2 * self.sequence, 1 << 40)
        within("batch", self.batch, 1, 4096)
        within("seed", self.seed, -(2**62), 2**62)
        if not 0 < self.held_out_share < 1:
            raise ConfigError(f"held_out_share: {self.held_out_share!r} is not valid; use more than 0, less than 1")

    def num_tokens(self, on_gpu: bool) -> int:
        """`tokens`, or what suits the device."""
        usual = 16_384 if on_gpu else 4_096
        return self.tokens if self.tokens is not None else max(usual, 2 * self.sequence)


@dataclass(frozen=True, slots=True)
class GateThresholds:
    """What a candidate must pass to take its original's place.

    Numbers that text decides are judged by the unfavourable end of their one-sided interval at `confidence`, over at
    least `min_tokens` tokens. `faster_at`: numbers of sequences at which a decoding step must take less time than the
    original's; a recipe claims none unless it says so. `faster_at_cpu` is what it claims on CPUs (None: the same).
    `min_acceptance_ratio`: share of drafts accepted, as a multiple of the original's, where there is a drafter.
    """

    max_perplexity_ratio: float = 1.03
    min_top1_agreement: float = 0.95
    faster_at: tuple[int, ...] = ()
    faster_at_cpu: tuple[int, ...] | None = None
    min_acceptance_ratio: float = 0.9
    min_tokens: int = 50_000
    confidence: float = 0.95

    def __post_init__(self) -> None:
        if not (math.isfinite(self.max_perplexity_ratio) and self.max_perplexity_ratio > 0):
            raise ConfigError(f"max_perplexity_ratio: {self.max_perplexity_ratio!r} is not valid; use more than 0")
        within("min_top1_agreement", self.min_top1_agreement, 0.0, 1.0)
        within("min_acceptance_ratio", self.min_acceptance_ratio, 0.0, 1e3)
        within("min_tokens", self.min_tokens, 1, 1 << 40)
        if not 0.5 <= self.confidence < 1:
            raise ConfigError(f"confidence: {self.confidence!r} is not valid; use 0.5 or more and less than 1")
        for name, tiers in (("faster_at", self.faster_at), ("faster_at_cpu", self.faster_at_cpu or ())):
            for tier in tiers:
                within(name, tier, 1, 65_536)

    def on(self, device_type: str) -> GateThresholds:
        """As they are on a device: `faster_at` is what is claimed there."""
        claimed = self.faster_at if device_type != "cpu" or self.faster_at_cpu is None else self.faster_at_cpu
        return replace(self, faster_at=claimed, faster_at_cpu=None)


@dataclass(frozen=True, slots=True)
class Recipe:
    """All of it. `weights` … `minimum` is the format of layers that no rule changes (with method auto: none has it).

    `kv_cache` "fp8": the KV cache is to be served in float8 (GPUs only). `unquantized_dtype`: what embeddings, norms
    and kept layers are stored in; "source" leaves them as they are.
    """

    name: str
    description: str = ""
    method: str = "max"
    weights: str = "int8"
    activations: str = "none"
    group_size: int | None = None
    minimum: bool = False
    kv_cache: str = "auto"
    unquantized_dtype: str = "source"
    smoothing: Smoothing = field(default_factory=Smoothing)
    auto: AutoSearch = field(default_factory=AutoSearch)
    layers: tuple[LayerRule, ...] = ()
    calibration: CalibrationSettings = field(default_factory=CalibrationSettings)
    gate: GateThresholds = field(default_factory=GateThresholds)

    def __post_init__(self) -> None:
        if not self.name:
            raise ConfigError("name: '' is not valid; use letters, digits and dashes")
        one_of("method", self.method, METHODS)
        base = self.base  # checks its fields
        one_of("kv_cache", self.kv_cache, KV_CACHES)
        one_of("unquantized_dtype", self.unquantized_dtype, DTYPES)
        if self.method == "smoothquant" and (base.weights, base.activations) != ("int8", "int8"):
            given = f"{self.weights}/{self.activations}"
            raise ConfigError(f"method: 'smoothquant' is not valid for weights/activations {given}; use int8/int8")
        if self.method == "awq" and base.weights != "int4":
            raise ConfigError(f"method: 'awq' is not valid for weights {self.weights!r}; use int4")
        for rule in self.layers:
            if not rule.keep:
                rule.applied(base)

    @property
    def base(self) -> LayerFormat:
        """The format of layers that no rule changes."""
        return LayerFormat(self.weights, self.activations, self.group_size, self.minimum)

    @property
    def needs_text(self) -> bool:
        """Whether activations are looked at. Scales from weights alone need none."""
        return self.method != "max"

    def format_for(self, name: str, base: LayerFormat | None = None) -> LayerFormat | None:
        """The format of the layer of that name, None for high precision."""
        result: LayerFormat | None = None if name in ALWAYS_KEPT else base or self.base
        for rule in self.layers:
            named = name == rule.pattern if name in ALWAYS_KEPT else fnmatchcase(name, rule.pattern)
            if named:
                result = None if rule.keep else rule.applied(base or self.base)
        return result
