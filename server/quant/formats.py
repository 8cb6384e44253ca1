"""How the weights of a linear layer are stored in low precision, and what each stored tensor means.

One description for every source (our recipes, GGUF blocks, other projects' checkpoints) and every kernel. Kernels may
repack what is here once, at load; `QuantizedWeight.dequantize` is the oracle for all of them.

    w[o, k] = scale[o, k // group] * q[o, k] + minimum[o, k // group]        x[n, k] is multiplied by input_scale[k]

fp8    q is float8_e4m3fn [O, K]
int8   q is int8 [O, K]
int4   q is 0 … 15 in uint8 [O, K / 2], the even column in the low nibble; without minimum, 8 is subtracted first

Precision of the activations belongs to the weights too: were it a kernel's choice, plain decoding and verification
could compute two different functions. A row is quantised by itself, symmetrically: scale = max |x| / LIMIT over the row
(or over each group of it), q = x / scale rounded to nearest even.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Literal, get_args

import torch
from torch import Tensor

WeightKind = Literal["fp8", "int8", "int4"]
ActivationKind = Literal["none", "fp8", "int8", "int8-group"]

FP8 = torch.float8_e4m3fn
LIMITS: dict[str, float] = {"fp8": 448.0, "int8": 127.0, "int8-group": 127.0}
"""The largest magnitude that a quantised activation takes."""


@dataclass(frozen=True, slots=True)
class LinearFormat:
    """What a linear layer is stored and computed in.

    `group_size` columns share a scale (None: all of a row do). `minimum`: groups have one beside the scale.
    `activations`: "none" leaves them as they come; "fp8" and "int8" have one scale a token, "int8-group" one for each
    group of a token. `smooth`: activations are multiplied by a factor a column first (SmoothQuant, AWQ).
    """

    weights: WeightKind
    activations: ActivationKind = "none"
    group_size: int | None = None
    minimum: bool = False
    smooth: bool = False

    def __post_init__(self) -> None:
        if self.weights not in get_args(WeightKind):
            raise ValueError(f"weights: {self.weights!r} is not valid; use one of {', '.join(get_args(WeightKind))}")
        if self.activations not in get_args(ActivationKind):
            valid = ", ".join(get_args(ActivationKind))
            raise ValueError(f"activations: {self.activations!r} is not valid; use one of {valid}")
        if self.group_size is not None and (self.group_size < 16 or self.group_size % 16):
            raise ValueError(f"group_size: {self.group_size} is not valid; use a multiple of 16")
        if self.activations == "int8-group" and self.group_size is None:
            raise ValueError("activations: int8-group needs a group_size")
        if self.weights == "fp8" and self.minimum:
            raise ValueError("minimum: not for fp8 weights")

    @property
    def name(self) -> str:
        """Short, for logs and tables: `int4-g32-min`, `int8+int8`, `fp8+fp8-smooth`."""
        parts = [
            self.weights,
            *([f"g{self.group_size}"] if self.group_size else []),
            *(["min"] if self.minimum else []),
        ]
        name = "-".join(parts) + (f"+{self.activations}" if self.activations != "none" else "")
        return name + ("-smooth" if self.smooth else "")

    @property
    def bits(self) -> int:
        """Of a stored weight, scales apart."""
        return 4 if self.weights == "int4" else 8


@dataclass(frozen=True, slots=True)
class QuantizedWeight:
    """W [O, K] as it is stored. `values` as the module says; `scales` [O], or [O, K / group_size]; `minimums` the same
    shape; `input_scales` [K]. Scales are floating point of any width; arithmetic on them is float32.
    """

    format: LinearFormat
    values: Tensor
    scales: Tensor
    minimums: Tensor | None = None
    input_scales: Tensor | None = None

    def __post_init__(self) -> None:
        rows, columns = self.shape
        group = self.format.group_size
        if group is not None and columns % group:
            raise ValueError(f"group_size {group} does not divide {columns} columns")
        wanted = (rows,) if group is None else (rows, columns // group)
        given = {"scales": self.scales, **({} if self.minimums is None else {"minimums": self.minimums})}
        for name, tensor in given.items():
            if tuple(tensor.shape) != wanted:
                raise ValueError(f"{name} are {list(tensor.shape)}, not {list(wanted)}")
        if (self.minimums is not None) != self.format.minimum:
            raise ValueError(f"minimums do not fit format {self.format.name}")
        if (self.input_scales is not None) != self.format.smooth:
            raise ValueError(f"input_scales do not fit format {self.format.name}")
        dtype = {"fp8": FP8, "int8": torch.int8, "int4": torch.uint8}[self.format.weights]
        if self.values.dtype != dtype:
            raise ValueError(f"values are {self.values.dtype}, not {dtype}")

    @property
    def shape(self) -> tuple[int, int]:
        """(O, K)."""
        rows, stored = self.values.shape
        return rows, stored * 2 if self.format.weights == "int4" else stored

    @property
    def device(self) -> torch.device:
        return self.values.device

    def integers(self) -> Tensor:
        """What is stored of 4-bit weights: 0 … 15, uint8 [O, K]."""
        return torch.stack([self.values & 15, self.values >> 4], dim=-1).flatten(1)

    def numbers(self) -> Tensor:
        """The values in float32 [O, K], centred where there is no minimum."""
        if self.format.weights != "int4":
            return self.values.float()
        numbers = self.integers().float()
        return numbers if self.format.minimum else numbers - 8.0

    def dequantize(self, dtype: torch.dtype = torch.float32) -> Tensor:
        """W [O, K], computed in float32 and rounded once. `input_scales` are not in it: they belong to x."""
        if self.values.is_meta:  # not by torch's functions for it: see `stacked`
            return self.values.new_empty(self.shape, dtype=dtype)
        rows, columns = self.shape
        grouped = self.numbers().view(rows, -1, self.format.group_size or columns)
        result = grouped * self.scales.float().view(rows, -1, 1)
        if self.minimums is not None:
            result = result + self.minimums.float().view(rows, -1, 1)
        return result.view(rows, columns).to(dtype)

    def effective(self, dtype: torch.dtype = torch.float32) -> Tensor:
        """W [O, K] for activations that nobody multiplies by `input_scales`: they are in it. Rounded once."""
        weight = self.dequantize()
        return (weight if self.input_scales is None else weight * self.input_scales.float()).to(dtype)

    def rows(self, index: Tensor) -> QuantizedWeight:
        """Rows `index` [n] int64 in that order; a row's groups move with it."""
        minimums = None if self.minimums is None else self.minimums[index]
        values = self.values.view(torch.uint8)[index].view(self.values.dtype)  # float8 has no indexing on a CPU
        return replace(self, values=values, scales=self.scales[index], minimums=minimums)

    def reordered(self, reorder: Callable[[Tensor], Tensor]) -> QuantizedWeight:
        """Rows as `reorder` makes them of a tensor of as many rows; a row's groups move with it."""
        minimums = None if self.minimums is None else reorder(self.minimums)
        values = reorder(self.values.view(torch.uint8)).view(self.values.dtype)
        return replace(self, values=values, scales=reorder(self.scales), minimums=minimums)

    def to(self, device: torch.device) -> QuantizedWeight:
        """The same on a device."""
        move = {
            name: tensor.to(device)
            for name in ("values", "scales", "minimums", "input_scales")
            if (tensor := getattr(self, name)) is not None
        }
        return replace(self, **move)


def stacked(parts: Sequence[Tensor]) -> Tensor:
    """The rows of all parts, one part after another."""
    first = parts[0]
    if not first.is_meta:
        return torch.cat(list(parts))
    # torch.cat of tensors without memory imports torch's compiler, which takes seconds.
    return first.new_empty(sum(len(part) for part in parts), *first.shape[1:])


def can_join(parts: Sequence[QuantizedWeight]) -> bool:
    """Whether the parts can be one layer of all their outputs: same format, columns and factors of the activations."""
    first = parts[0]
    for part in parts[1:]:
        if part.format != first.format or part.shape[1] != first.shape[1] or part.scales.dtype != first.scales.dtype:
            return False
        mine, theirs = first.input_scales, part.input_scales
        if mine is not None and theirs is not None and not torch.equal(mine, theirs):
            return False
    return True


def join(parts: Sequence[QuantizedWeight]) -> QuantizedWeight:
    """One layer of all outputs, in order. Raises ValueError where `can_join` says no."""
    if not can_join(parts):
        raise ValueError(f"layers of formats {', '.join(part.format.name for part in parts)} cannot be joined")
    first = parts[0]
    values = stacked([part.values.view(torch.uint8) for part in parts]).view(first.values.dtype)
    minimums = None if first.minimums is None else stacked([p.minimums for p in parts if p.minimums is not None])
    return replace(first, values=values, scales=stacked([part.scales for part in parts]), minimums=minimums)


def quantize_activations(
    x: Tensor, activations: ActivationKind, group_size: int | None = None
) -> tuple[Tensor, Tensor]:
    """Of x [N, K]: (q [N, K] of int8 or float8_e4m3fn, scales [N, 1] or [N, K / group_size], float32).

    The reference that kernels agree with bit for bit. A row (or group) of zeros has scale 0 and q 0.
    """
    limit = LIMITS[activations]
    columns = group_size if activations == "int8-group" and group_size else x.shape[1]
    grouped = x.float().unflatten(1, (-1, columns))
    scales = grouped.abs().amax(-1, keepdim=True) / limit
    q = grouped / torch.where(scales > 0, scales, 1.0)
    q = q.to(FP8) if activations == "fp8" else q.round().to(torch.int8)
    return q.flatten(1), scales.squeeze(-1)


def reference_linear(x: Tensor, weight: QuantizedWeight, bias: Tensor | None = None) -> Tensor:
    """Maps x [N, K] to [N, O] in its dtype: what every kernel computes, up to the rounding of its float32 sums."""
    inputs = x.float() if weight.input_scales is None else x.float() * weight.input_scales.float()
    form = weight.format
    if form.activations != "none":
        q, scales = quantize_activations(inputs, form.activations, form.group_size)
        inputs = (q.float().unflatten(1, (scales.shape[1], -1)) * scales[:, :, None]).flatten(1)
    result = inputs @ weight.dequantize().t()
    return (result if bias is None else result + bias.float()).to(x.dtype)
