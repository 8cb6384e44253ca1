"""Which layers of a model get which format, from its files' headers alone. No torch."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, replace
from fnmatch import fnmatchcase

from optimize.errors import OptimizeError
from optimize.recipe import GROUP_SIZES, LayerFormat, Recipe
from server.config import ConfigError
from server.models.config import LLAMA_FAMILY, architecture_of
from server.models.source import ModelSource, load_index

DECODER_LINEAR = re.compile(r"model\.layers\.\d+\.(self_attn\.[qkvo]_proj|mlp\.(gate|up|down)_proj)")
_IN_LAYER = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
HEAD, EMBEDDING = "lm_head", "model.embed_tokens"


@dataclass(frozen=True, slots=True)
class Plan:
    """Formats by layer name, in the order of the network; `kept` are linear layers that stay in high precision.

    `notes` say what differs from the recipe and why.
    """

    layers: dict[str, LayerFormat]
    kept: tuple[str, ...]
    notes: tuple[str, ...]


def plan_layers(recipe: Recipe, source: ModelSource, chosen: Mapping[str, LayerFormat] | None = None) -> Plan:
    """`chosen` is what method auto chose for each layer instead of the recipe's format; what it left out is kept.
    Rules go before it.

    Raises OptimizeError for models that cannot be served quantised, ConfigError where no group size fits or a rule
    matches nothing.
    """
    if architecture_of(source.config) not in LLAMA_FAMILY:
        raise OptimizeError(
            f"{source.name}: {architecture_of(source.config)} cannot be quantised here; "
            f"these can: {', '.join(LLAMA_FAMILY)}"
        )
    if source.config.get("quantization_config"):
        raise OptimizeError(f"{source.name}: is quantised already; name the original model")
    shapes = {name: entry.shape for name, entry in load_index(source.directory).items()}
    if HEAD + ".weight" not in shapes:  # tied: a quantised head unties it, the embedding stays as it is
        shapes[HEAD + ".weight"] = shapes[EMBEDDING + ".weight"]
    names = [name.removesuffix(".weight") for name in shapes if name.endswith(".weight")]
    linear = sorted((n for n in names if DECODER_LINEAR.fullmatch(n) or n == HEAD), key=_order)
    _check_rules(recipe, linear)
    layers: dict[str, LayerFormat] = {}
    notes: list[str] = []
    for name in linear:
        form = recipe.format_for(name, (chosen or {}).get(name))
        left_alone = chosen is not None and name not in chosen and not _is_ruled(recipe, name)
        if form is not None and not left_alone:
            layers[name] = _fitted(form, shapes[name + ".weight"][1], notes)
    kept = tuple(name for name in linear if name not in layers)
    return Plan(layers, kept, tuple(dict.fromkeys(notes)))


def _is_ruled(recipe: Recipe, name: str) -> bool:
    return any(fnmatchcase(name, rule.pattern) for rule in recipe.layers)


def _order(name: str) -> tuple[int, int]:
    number = re.search(r"\.(\d+)\.", name)
    return (int(number[1]), _IN_LAYER.index(name.rpartition(".")[2])) if number else (1 << 30, 0)


def _check_rules(recipe: Recipe, linear: list[str]) -> None:
    for rule in recipe.layers:
        if rule.pattern == EMBEDDING and not rule.keep:
            raise ConfigError(f"pattern: {EMBEDDING!r} is not valid with a format; embeddings stay in high precision")
        if rule.pattern != EMBEDDING and not any(fnmatchcase(name, rule.pattern) for name in linear):
            raise ConfigError(
                f"pattern: {rule.pattern!r} matches no linear layer; names are such as {linear[0]}, {linear[-1]}"
            )


def _fitted(form: LayerFormat, columns: int, notes: list[str]) -> LayerFormat:
    """The format with a group size that divides the columns."""
    size = form.group_size
    if size is None or columns % size == 0:
        return form
    fitting = [s for s in GROUP_SIZES if s < size and columns % s == 0]
    if not fitting:
        raise ConfigError(f"group_size: {size} does not divide {columns} columns, and no smaller one does; keep them")
    notes.append(f"group size {fitting[-1]} in place of {size} where there are {columns} columns")
    return replace(form, group_size=fitting[-1])
