"""GGUF blocks as the weights of `server.quant.formats`: the same values in another layout. numpy only.

    w[o, k] = scale[o, k // group] * q[o, k] + minimum[o, k // group]

ggml's blocks are of that form themselves (https://github.com/ggml-org/ggml, ggml-quants.c), so nothing is rounded:
dequantising what is made here gives gguf's own dequantisation bit for bit, both being one float32 product and, where
there is a minimum, one float32 sum. Scales of the simple types stay the float16 that they are. Those of the K-quants
are a float16 times a whole number: a float32, stored as one.

Codebooks whose entries are several values (IQ1, IQ2, IQ3), ternary types and MXFP4 have no format here: `layout` says
None, and whoever converts stores them dequantised.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from server.models.gguf import GGML_TYPES, Bytes

Array = NDArray[Any]

_IQ4_VALUES = np.array([-127, -104, -83, -65, -49, -35, -22, -10, 1, 13, 25, 38, 53, 69, 89, 113], dtype=np.int8)
"""ggml's kvalues_iq4nl: what the sixteen codes of IQ4_NL and IQ4_XS stand for."""


@dataclass(frozen=True, slots=True)
class Layout:
    """How the blocks of one GGML type are kept: fields of `LinearFormat`, and the dtype of scales and minimums."""

    weights: Literal["int4", "int8"]
    group_size: int
    minimum: bool
    scale_dtype: type[np.float16] | type[np.float32]

    def fields(self, activations: str = "none") -> dict[str, Any]:
        """Of the LinearFormat, as `config.json` lists them."""
        return {
            "weights": self.weights,
            "activations": activations,
            "group_size": self.group_size,
            "minimum": self.minimum,
            "smooth": False,
        }

    def value_dtype(self) -> type[np.uint8] | type[np.int8]:
        """Of the stored values."""
        return np.uint8 if self.weights == "int4" else np.int8

    def columns(self, num_values: int) -> int:
        """Stored values a row of `num_values` weights."""
        return num_values // 2 if self.weights == "int4" else num_values


@dataclass(frozen=True, slots=True)
class Packed:
    """Rows as they are stored: `values` [R, K] int8 or [R, K / 2] uint8, `scales` and `minimums` [R, K / group]."""

    values: Array
    scales: Array
    minimums: Array | None


@dataclass(frozen=True, slots=True)
class _Type:
    layout: Layout
    unpack: Callable[[Bytes], tuple[Array, Array, Array | None]]
    """Blocks [n, bytes] to (values [n, stored], scales [n, groups], minimums [n, groups] or None)."""


def layout(type_name: str) -> Layout | None:
    """How blocks of a GGML type are kept; None for types that only dequantising can read."""
    return _TYPES[type_name].layout if type_name in _TYPES else None


def pack(blocks: Bytes, type_name: str) -> Packed:
    """Blocks [R, bytes a row] of a type that `layout` knows, in the order in which the rows come.

    Raises KeyError for other types, ValueError for rows that are no whole number of blocks.
    """
    kind = _TYPES[type_name]
    _, _, block_bytes = next(entry for entry in GGML_TYPES.values() if entry[0] == type_name)
    rows, row_bytes = blocks.shape
    if row_bytes % block_bytes:
        raise ValueError(f"rows of {row_bytes} bytes are no whole number of {type_name} blocks ({block_bytes} bytes)")
    split = np.ascontiguousarray(blocks).reshape(-1, block_bytes)
    with np.errstate(invalid="ignore", over="ignore"):  # a scale may be infinite, as in gguf's own dequantisation
        values, scales, minimums = kind.unpack(split)
    columns = row_bytes // block_bytes

    def as_rows(array: Array, dtype: type[np.generic]) -> Array:
        return np.ascontiguousarray(array.reshape(rows, columns * array.shape[1]).astype(dtype, copy=False))

    form = kind.layout
    return Packed(
        values=as_rows(values.view(form.value_dtype()), form.value_dtype()),
        scales=as_rows(scales, form.scale_dtype),
        minimums=None if minimums is None else as_rows(minimums, form.scale_dtype),
    )


def _half(blocks: Bytes, at: int) -> NDArray[np.float16]:
    """The float16 at byte `at` of each block, [n, 1]."""
    return np.ascontiguousarray(blocks[:, at : at + 2]).view(np.float16)


def _bits(data: Bytes, run: int, width: int) -> Bytes:
    """Numbers of `width` bits in ggml's order: of every `run` bytes first all the lowest, then the next, … [n, all]."""
    shifts = np.arange(0, 8, width, dtype=np.uint8).reshape(1, 1, -1, 1)
    spread = (data.reshape(len(data), -1, 1, run) >> shifts) & np.uint8((1 << width) - 1)
    return spread.reshape(len(data), -1)


def _paired(values: Bytes) -> Bytes:
    """4-bit values [n, K] two a byte, the even column in the low nibble: [n, K / 2]."""
    return values[:, 0::2] | (values[:, 1::2] << np.uint8(4))


def _repaired(data: Bytes, run: int) -> Bytes:
    """`_paired(_bits(data, run, 4))` without the step between: [n, B] bytes to [n, B]."""
    runs = data.reshape(len(data), -1, run)
    even, odd = runs[:, :, 0::2], runs[:, :, 1::2]
    low = (even & np.uint8(15)) | (odd << np.uint8(4))
    high = (even >> np.uint8(4)) | (odd & np.uint8(0xF0))
    return np.stack([low, high], axis=2).reshape(len(data), -1)


def _signed(values: Bytes, zero: int) -> NDArray[np.int8]:
    return values.view(np.int8) - np.int8(zero)


def _q4_0(blocks: Bytes) -> tuple[Array, Array, None]:
    return _repaired(blocks[:, 2:], 16), _half(blocks, 0), None


def _q4_1(blocks: Bytes) -> tuple[Array, Array, Array]:
    return _repaired(blocks[:, 4:], 16), _half(blocks, 0), _half(blocks, 2)


def _q5(blocks: Bytes, at: int) -> Bytes:
    """Values 0 … 31 of Q5_0 and Q5_1: 32 high bits at byte `at`, the low four after them."""
    high = np.unpackbits(blocks[:, at : at + 4], axis=1, bitorder="little")
    return _bits(blocks[:, at + 4 :], 16, 4) | (high << np.uint8(4))


def _q5_0(blocks: Bytes) -> tuple[Array, Array, None]:
    return _signed(_q5(blocks, 2), 16), _half(blocks, 0), None


def _q5_1(blocks: Bytes) -> tuple[Array, Array, Array]:
    return _q5(blocks, 4), _half(blocks, 0), _half(blocks, 2)


def _q8_0(blocks: Bytes) -> tuple[Array, Array, None]:
    return np.ascontiguousarray(blocks[:, 2:]), _half(blocks, 0), None


def _q2_k(blocks: Bytes) -> tuple[Array, Array, Array]:
    packed = blocks[:, :16]  # sixteen groups: scale in the low nibble, minimum in the high one
    scales = _product(_half(blocks, 80), packed & np.uint8(15))
    return _paired(_bits(blocks[:, 16:80], 32, 2)), scales, -_product(_half(blocks, 82), packed >> np.uint8(4))


def _q3_k(blocks: Bytes) -> tuple[Array, Array, None]:
    """A value is its two low bits, less 4 where the bit of the mask is clear; stored with 8 more, from 4 to 11."""
    keep = _bits(blocks[:, :32], 32, 1)
    values = _bits(blocks[:, 32:96], 32, 2) + np.uint8(4) + (keep << np.uint8(2))
    packed = blocks[:, 96:108]
    scales = _bits(packed[:, :8], 8, 4) | (_bits(packed[:, 8:], 4, 2) << np.uint8(4))
    return _paired(values), _product(_half(blocks, 108), _signed(scales, 32)), None


def _q4_k(blocks: Bytes) -> tuple[Array, Array, Array]:
    scales, minimums = _k_scales(blocks)
    return _repaired(blocks[:, 16:], 32), scales, minimums


def _q5_k(blocks: Bytes) -> tuple[Array, Array, Array]:
    scales, minimums = _k_scales(blocks)
    return _bits(blocks[:, 48:], 32, 4) | (_bits(blocks[:, 16:48], 32, 1) << np.uint8(4)), scales, minimums


def _q6_k(blocks: Bytes) -> tuple[Array, Array, None]:
    values = _bits(blocks[:, :128], 64, 4) | (_bits(blocks[:, 128:192], 32, 2) << np.uint8(4))
    scales = np.ascontiguousarray(blocks[:, 192:208]).view(np.int8)
    return _signed(values, 32), _product(_half(blocks, 208), scales), None


def _iq4_nl(blocks: Bytes) -> tuple[Array, Array, None]:
    return _IQ4_VALUES[_bits(blocks[:, 2:], 16, 4)], _half(blocks, 0), None


def _iq4_xs(blocks: Bytes) -> tuple[Array, Array, None]:
    low = _bits(np.ascontiguousarray(blocks[:, 4:8]).reshape(-1, 1), 1, 4).reshape(len(blocks), 8)
    high = _bits(np.ascontiguousarray(blocks[:, 2:4]).reshape(-1, 1), 1, 2).reshape(len(blocks), 8)
    scales = _product(_half(blocks, 0), _signed(low | (high << np.uint8(4)), 32))
    return _IQ4_VALUES[_bits(blocks[:, 8:], 16, 4)], scales, None


def _k_scales(blocks: Bytes) -> tuple[NDArray[np.float32], NDArray[np.float32]]:
    """Scales and minimums [n, 8] of Q4_K and Q5_K: twelve bytes after the block's own two factors hold 6 bits each.

    The first four groups have theirs in bytes 0-3 and 4-7; of the others the low four bits are the nibbles of bytes
    8-11, the two high ones those that bytes 0-7 have left. w = d·s·q − dmin·m: the minimum is stored negated.
    """
    s, m, rest = blocks[:, 4:8], blocks[:, 8:12], blocks[:, 12:16]
    low_six, top_two = np.uint8(0x3F), np.uint8(0x30)
    scales = np.concatenate([s & low_six, (rest & np.uint8(15)) | ((s >> np.uint8(2)) & top_two)], axis=1)
    minimums = np.concatenate([m & low_six, (rest >> np.uint8(4)) | ((m >> np.uint8(2)) & top_two)], axis=1)
    return _product(_half(blocks, 0), scales), -_product(_half(blocks, 2), minimums)


def _product(factor: NDArray[np.float16], numbers: Array) -> NDArray[np.float32]:
    return factor.astype(np.float32) * numbers.astype(np.float32)


_F16, _F32 = np.float16, np.float32
_TYPES: dict[str, _Type] = {
    "Q4_0": _Type(Layout("int4", 32, False, _F16), _q4_0),
    "Q4_1": _Type(Layout("int4", 32, True, _F16), _q4_1),
    "Q5_0": _Type(Layout("int8", 32, False, _F16), _q5_0),
    "Q5_1": _Type(Layout("int8", 32, True, _F16), _q5_1),
    "Q8_0": _Type(Layout("int8", 32, False, _F16), _q8_0),
    "Q2_K": _Type(Layout("int4", 16, True, _F32), _q2_k),
    "Q3_K": _Type(Layout("int4", 16, False, _F32), _q3_k),
    "Q4_K": _Type(Layout("int4", 32, True, _F32), _q4_k),
    "Q5_K": _Type(Layout("int8", 32, True, _F32), _q5_k),
    "Q6_K": _Type(Layout("int8", 16, False, _F32), _q6_k),
    "IQ4_NL": _Type(Layout("int8", 32, False, _F16), _iq4_nl),
    "IQ4_XS": _Type(Layout("int8", 32, False, _F32), _iq4_xs),
}
