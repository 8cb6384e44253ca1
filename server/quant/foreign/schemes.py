"""What a compressed-tensors `config_groups` entry says of a layer, and what of it can be represented.

Fields: compressed-tensors 0.20, `quantization/quant_args.py` and `quantization/quant_scheme.py`. Never imports torch.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from server.quant.formats import ActivationKind

_FORMATS = ("pack-quantized", "int-quantized", "float-quantized", "naive-quantized", "mixed-precision")
_WEIGHT_STRATEGIES = {"float": ("tensor", "channel"), "int": ("tensor", "channel", "group")}


class SchemeError(ValueError):
    """A scheme cannot be represented; the message names field, value and what works."""


@dataclass(frozen=True, slots=True)
class Scheme:
    """`kind` is "fp8" or "int"; `static`: the checkpoint holds a scale of the activations."""

    targets: tuple[str, ...]
    kind: str
    bits: int
    activations: ActivationKind
    static: bool = False


def parse_schemes(config: Mapping[str, Any]) -> list[Scheme]:
    """Of a `quantization_config`. Raises SchemeError."""
    for field in ("transform_config", "sparsity_config"):
        if _says_something(config.get(field)):
            raise SchemeError(f"quantization_config: {field} is not supported; a checkpoint without it works")
    groups = config.get("config_groups")
    if not isinstance(groups, Mapping) or not groups:
        raise SchemeError("quantization_config: config_groups is missing or empty")
    found = []
    for name, group in groups.items():
        where = f"quantization_config: config_groups.{name}"
        if not isinstance(group, Mapping):
            raise SchemeError(f"{where} is {group!r}; a group with its weights and targets spelt out works")
        stored = group.get("format") or config.get("format")
        if stored == "dense":
            continue
        if stored not in _FORMATS:
            raise SchemeError(f"{where}: format {stored!r} is not supported; {', '.join(_FORMATS[:4])} work")
        found.append(_scheme(where, group))
    return found


def matches(name: str, module: str, patterns: Iterable[str]) -> bool:
    """Whether a layer is named: by its name, by its module's class, or by `re:` and an expression it begins with."""
    return any(
        re.match(pattern[3:], name) is not None if pattern.startswith("re:") else pattern in (name, module)
        for pattern in patterns
    )


def _scheme(where: str, group: Mapping[str, Any]) -> Scheme:
    weights = group.get("weights")
    if not isinstance(weights, Mapping):
        raise SchemeError(f"{where}: weights is {weights!r}; quantised weights work")
    if group.get("output_activations"):
        raise SchemeError(f"{where}: output_activations is not supported; groups without it work")
    kind, bits = weights.get("type", "int"), weights.get("num_bits", 8)
    strategy = _strategy(weights)
    if kind not in _WEIGHT_STRATEGIES:
        raise SchemeError(f"{where}: weights.type {kind!r} is not supported; int and float work")
    if bits != 8 and not (kind == "int" and bits == 4):
        raise SchemeError(
            f"{where}: weights.num_bits {bits!r} of type {kind} is not supported; int of 4 and 8 bits, float of 8 work"
        )
    if strategy not in _WEIGHT_STRATEGIES[kind]:
        valid = ", ".join(_WEIGHT_STRATEGIES[kind])
        raise SchemeError(f"{where}: weights.strategy {strategy!r} of type {kind} is not supported; {valid} work")
    if kind == "float" and not weights.get("symmetric", True):
        raise SchemeError(f"{where}: weights.symmetric False of type float is not supported; True works")
    activations, static = _activations(f"{where}: input_activations", group.get("input_activations"), weights)
    targets = tuple(str(target) for target in group.get("targets") or ())
    return Scheme(targets, "fp8" if kind == "float" else "int", int(bits), activations, static)


def _activations(where: str, args: Any, weights: Mapping[str, Any]) -> tuple[ActivationKind, bool]:
    """(the kind as in server.quant.formats, whether the checkpoint has static scales)."""
    if args is None:
        return "none", False
    kind, bits, strategy, dynamic = (
        args.get("type", "int"),
        args.get("num_bits", 8),
        _strategy(args),
        args.get("dynamic"),
    )
    if bits != 8 or kind not in ("int", "float"):
        raise SchemeError(f"{where} of {bits!r} bits, type {kind!r}, is not supported; int and float of 8 bits work")
    if not args.get("symmetric", True):
        raise SchemeError(f"{where}.symmetric False is not supported; True works")
    ours: ActivationKind = "int8" if kind == "int" else "fp8"
    if strategy == "token" or (strategy == "tensor" and dynamic in (True, False, None)):
        return ours, strategy == "tensor"
    if (
        strategy == "group"
        and ours == "int8"
        and dynamic is True
        and args.get("group_size") == weights.get("group_size")
    ):
        return "int8-group", False
    raise SchemeError(
        f"{where}.strategy {strategy!r} of type {kind} (dynamic {dynamic!r}) is not supported; token works, tensor, "
        "and for int dynamic groups of the weights' size"
    )


def _strategy(args: Mapping[str, Any]) -> str:
    """As compressed-tensors infers it where it is not given."""
    size = args.get("group_size")
    inferred = "tensor" if size is None else "channel" if size == -1 else "group"
    return str(args.get("strategy") or inferred)


def _says_something(value: Any) -> bool:
    if isinstance(value, Mapping):
        return any(_says_something(v) for k, v in value.items() if k != "format") or (
            value.get("format") not in (None, "dense")
        )
    return bool(value)
