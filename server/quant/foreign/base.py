"""What the dialects share: how they are called, how they refuse, and integers packed into 32-bit words."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from server.quant.formats import ActivationKind, LinearFormat, QuantizedWeight

DYNAMIC_NOTICE = (
    "activations are quantised with one scale a token, found as it comes, instead of the scale a tensor that the "
    "checkpoint holds: closer to the unquantised model, not the same function as its authors measured"
)


class ForeignCheckpointError(ValueError):
    """A quantised checkpoint of another project cannot be represented; the message names tensor and field, and what
    works."""


class RawTensors(Protocol):
    """A checkpoint's tensors by name, as they are stored."""

    def has(self, name: str) -> bool:
        """Whether there is a tensor of that name."""

    def read(self, name: str) -> Tensor:
        """The tensor in its own dtype (packed integers, float8 and float32 scales would not survive a cast)."""


class Dialect(Protocol):
    """How one project stores quantised layers, read from a `config.json`."""

    @property
    def name(self) -> str:
        """For logs and messages."""

    @property
    def notices(self) -> tuple[str, ...]:
        """What is computed otherwise than the checkpoint says; to be logged once."""

    def weight(self, tensors: RawTensors, name: str) -> QuantizedWeight | None:
        """The linear layer `name` (`model.layers.0.mlp.up_proj`), None where it is stored unquantised or not at all.

        On torch's `meta` device shapes and formats are right; what depends on values is not checked there. Raises
        ForeignCheckpointError.
        """


@dataclass(frozen=True, slots=True)
class Parts:
    """The tensors of one layer."""

    tensors: RawTensors
    layer: str

    def has(self, part: str) -> bool:
        """Whether the layer has a tensor of that name."""
        return self.tensors.has(f"{self.layer}.{part}")

    def get(self, part: str) -> Tensor | None:
        """The tensor, None where there is none."""
        return self.tensors.read(f"{self.layer}.{part}") if self.has(part) else None

    def need(self, part: str) -> Tensor:
        """The tensor. Raises ForeignCheckpointError if it is missing."""
        found = self.get(part)
        if found is None:
            raise self.error(part, "is missing from the checkpoint")
        return found

    def error(self, part: str, why: str) -> ForeignCheckpointError:
        """An error that names the tensor."""
        return ForeignCheckpointError(f"{self.layer}.{part}: {why}")

    def shaped(self, part: str, tensor: Tensor, shape: tuple[int, ...]) -> Tensor:
        """`tensor` if it has the shape. Raises ForeignCheckpointError."""
        if tuple(tensor.shape) != shape:
            raise self.error(part, f"has shape {list(tensor.shape)}, not {list(shape)}")
        return tensor


def unpack(words: Tensor, bits: int) -> Tensor:
    """Unsigned integers of 4 or 8 bits from int32 [R, C], lowest bits first: uint8 [R, C · 32 / bits]."""
    narrow = words.contiguous().view(torch.uint8)  # little-endian, as every machine that we run on
    return narrow if bits == 8 else torch.stack([narrow & 15, narrow >> 4], dim=-1).flatten(1)


def pack_nibbles(numbers: Tensor) -> Tensor:
    """0 … 15 in uint8 [R, C] as uint8 [R, C / 2], the even column in the low nibble."""
    return numbers[:, 0::2] | (numbers[:, 1::2] << 4)


def row_scales(parts: Parts, part: str, rows: int) -> Tensor:
    """A scale a row, [O], from one of them, [O], or [O, 1]. Raises ForeignCheckpointError."""
    scales = parts.need(part)
    if scales.numel() == 1:
        return scales.reshape(1).expand(rows).contiguous()
    if tuple(scales.shape) not in ((rows,), (rows, 1)):
        raise parts.error(part, f"has shape {list(scales.shape)}; one scale, or one for each of {rows} rows works")
    return scales.reshape(rows)


def group_size_of(parts: Parts, part: str, scales: Tensor, columns: int) -> int | None:
    """Columns that share one of the scales [O, G]; None where all of a row do. Raises ForeignCheckpointError."""
    groups = scales.shape[1]
    if groups == 1:
        return None
    if columns % groups:
        raise parts.error(part, f"has {groups} groups a row, which do not divide {columns} columns")
    size = columns // groups
    if size % 16:
        raise parts.error(part, f"has groups of {size} columns; multiples of 16 work")
    return size


def integer_weight(
    parts: Parts,
    part: str,
    values: Tensor,
    scales: Tensor,
    zeros: Tensor | None,
    *,
    bits: int,
    activations: ActivationKind = "none",
    input_scales: Tensor | None = None,
) -> QuantizedWeight:
    """W = scale · (u − zero) with u unsigned, centred on 2^(bits − 1) where `zeros` is None.

    `values` hold u: uint8 [O, K], of 4 bits packed [O, K / 2] as in `QuantizedWeight`; `scales` and `zeros` [O, G].
    Where every zero is the centre there is no minimum; else minimums and scales are float32: a product of an 11-bit
    scale and a 4- or 8-bit zero is exact there. `part` names the scales in errors.
    """
    rows, columns = values.shape[0], values.shape[1] * (2 if bits == 4 else 1)
    if scales.dim() != 2 or scales.shape[0] != rows:
        raise parts.error(part, f"has shape {list(scales.shape)}, which does not fit {rows} rows")
    if zeros is not None and zeros.shape != scales.shape:
        raise parts.error(part, f"is of shape {list(scales.shape)}, zero points are {list(zeros.shape)}")
    centre = 1 << (bits - 1)
    if zeros is not None and not zeros.is_meta and bool((zeros == centre).all()):
        zeros = None
    group = group_size_of(parts, part, scales, columns)
    form = LinearFormat(
        "int4" if bits == 4 else "int8", activations, group, zeros is not None, smooth=input_scales is not None
    )
    minimums = None
    if zeros is not None:
        scales = scales.float()
        minimums = scales * ((0 if bits == 4 else centre) - zeros.float())
    if group is None:
        scales = scales.squeeze(1)
        minimums = None if minimums is None else minimums.squeeze(1)
    stored = values if bits == 4 else (values ^ 128).view(torch.int8)  # u − 128 in two's complement
    return QuantizedWeight(form, stored.contiguous(), scales.contiguous(), minimums, input_scales)
