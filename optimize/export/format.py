"""What the formats share."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace
from math import gcd
from typing import Any, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor

from server.quant.formats import LinearFormat, QuantizedWeight


@dataclass(frozen=True, slots=True)
class Settings:
    """`quantization_config` of `config.json`, and JSON files beside it."""

    quantization_config: dict[str, Any]
    files: Mapping[str, dict[str, Any]] = field(default_factory=dict)


class Format(Protocol):
    """How a quantised layer is written."""

    @property
    def name(self) -> str:
        """As in `--format`."""

    def prepare(self, weight: QuantizedWeight) -> QuantizedWeight:
        """The same layer in a shape that the format can hold, where there is an exact one."""

    def problem(self, layer: str, weight: QuantizedWeight) -> str | None:
        """Why the format cannot express a prepared layer; None if it can."""

    def tensors(self, layer: str, weight: QuantizedWeight) -> dict[str, Tensor]:
        """What is written of a layer without a problem, by name."""

    def settings(self, layers: Mapping[str, LinearFormat], others: list[str]) -> Settings:
        """What is said of the quantised `layers`, as prepared, and of the `others`, linear and not quantised."""


def common_group_size(forms: Iterable[LinearFormat]) -> int | None:
    """The largest that divides the group sizes of all 4-bit layers."""
    sizes = [form.group_size for form in forms if form.weights == "int4" and form.group_size is not None]
    return gcd(*sizes) if sizes else None


def regroup(weight: QuantizedWeight, size: int | None) -> QuantizedWeight:
    """The same weight in smaller groups: neighbours have the same scale."""
    old = weight.format.group_size
    if size is None or old is None or old == size or weight.format.activations == "int8-group":
        return weight
    times = old // size
    minimums = None if weight.minimums is None else weight.minimums.repeat_interleave(times, 1)
    scales = weight.scales.repeat_interleave(times, 1)
    return replace(weight, format=replace(weight.format, group_size=size), scales=scales, minimums=minimums)


def words(bytes_: Tensor) -> Tensor:
    """uint8 [R, C] as int32 [R, ⌈C / 4⌉], the first byte lowest."""
    padded = F.pad(bytes_, (0, -bytes_.shape[1] % 4))
    return padded.clone(memory_format=torch.contiguous_format).view(torch.int32)  # a single row may have any stride
