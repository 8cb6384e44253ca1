"""The safetensors file of a converted GGUF model: which tensors it holds, and writing them in parts. numpy only.

In the native form a tensor whose blocks `server.models.gguf_native` can keep becomes a quantised layer, named as
`server.quant.checkpoint` says; float16 and bfloat16 matrices keep their bits; everything else is float32, as all is
in the dequantised form.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
from numpy.typing import NDArray

from server.models.gguf import GgufFile, GgufTensor, dequantize
from server.models.gguf_native import Layout, layout, pack
from server.quant.checkpoint import MINIMUMS, SCALES, VALUES

VALUES_PER_CHUNK = 1 << 21  # 8 MiB of float32 at a time: stays near the caches and bounds the memory

Progress = Callable[[str, float], None]
"""Called as `progress(what, fraction)` with a fraction from 0 to 1."""

_ITEM_BYTES = {"F32": 4, "F16": 2, "BF16": 2, "I8": 1, "U8": 1}
_NAMES = {np.float32: "F32", np.float16: "F16", np.int8: "I8", np.uint8: "U8"}
_HALVES = ("F16", "BF16")
_WEIGHT = "." + VALUES


@dataclass(frozen=True, slots=True)
class Form:
    """What a GGUF file is converted to: everything in float32, or `native`, where layers keep their blocks' precision.

    `activations` is that of native layers: "none", or "int8-group", the arithmetic of llama.cpp's kernels (one scale
    for as many columns as share one in the weights). `text` leaves the weights out: the tokenizer and configurations.
    """

    native: bool = False
    activations: str = "none"
    text: bool = False

    @property
    def suffix(self) -> str:
        """Of a directory's name. The underscore keeps it apart from all names of models, which have none."""
        if not self.native:
            return "_text" if self.text else ""
        return "_native" if self.activations == "none" else f"_native_{self.activations}"

    def recorded(self) -> dict[str, str]:
        """As the record has it; a record that says nothing is of the dequantised form."""
        if self.native:
            return {"weights": "native", "activations": self.activations}
        return {"weights": "none" if self.text else "dequantised"}


DEQUANTISED = Form()
NATIVE = Form(native=True)
TEXT = Form(text=True)


@dataclass(frozen=True, slots=True)
class Stored:
    """One tensor of the safetensors file; `dtype` is safetensors' name."""

    name: str
    dtype: str
    shape: tuple[int, ...]

    @property
    def num_bytes(self) -> int:
        return prod(self.shape) * _ITEM_BYTES[self.dtype]


@dataclass(frozen=True, slots=True)
class Output:
    """One tensor of the model, under its Hugging Face name.

    `source` None means zeros (a bias that transformers expects). `order` is the file row of each row, None where the
    orders agree. `native`: its blocks or halves are kept where they can be.
    """

    name: str
    shape: tuple[int, ...]
    source: GgufTensor | None
    order: NDArray[np.int64] | None = None
    native: bool = False

    @property
    def layer(self) -> str:
        """The name of the layer whose weight it is."""
        return self.name.removesuffix(_WEIGHT)

    @property
    def layout(self) -> Layout | None:
        """How its blocks are kept, None if they are not."""
        if not self._may_keep or self.source is None:
            return None
        return layout(self.source.type_name)

    @property
    def lost(self) -> str | None:
        """The GGML type that the native form wanted to keep and could not."""
        if not self._may_keep or self.source is None:
            return None
        name = self.source.type_name
        return None if name in ("F32", *_HALVES) or layout(name) is not None else name

    @property
    def _may_keep(self) -> bool:
        return self.native and self.source is not None and len(self.shape) == 2 and self.name.endswith(_WEIGHT)

    def stored(self) -> list[Stored]:
        """What is written of it: one tensor, or values, scales and perhaps minimums."""
        form = self.layout
        if form is None:
            kept = self._may_keep and self.source is not None and self.source.type_name in _HALVES
            dtype = self.source.type_name if kept and self.source is not None else "F32"
            return [Stored(self.name, dtype, self.shape)]
        rows, columns = self.shape
        groups, scale = (rows, columns // form.group_size), _NAMES[form.scale_dtype]
        values = Stored(self.name, _NAMES[form.value_dtype()], (rows, form.columns(columns)))
        parts = [values, Stored(f"{self.layer}.{SCALES}", scale, groups)]
        return [*parts, Stored(f"{self.layer}.{MINIMUMS}", scale, groups)] if form.minimum else parts


def write_weights(file: GgufFile, outputs: Sequence[Output], path: Path, progress: Progress) -> None:
    """Write all outputs to `path`, a part at a time; raises OSError where the disk does not take them."""
    stored = _aligned([part for output in outputs for part in output.stored()])
    header, places = _header(stored)
    total = sum(part.num_bytes for part in stored)
    done = 0
    with path.open("wb") as stream:
        stream.write(header)
        for output in outputs:
            for num_bytes in _write(file, output, stream, places):
                done += num_bytes
                progress(output.name, done / total)


def _aligned(stored: list[Stored]) -> list[Stored]:
    """Wide items first, so that every tensor lies at a multiple of its item's size."""
    return sorted(stored, key=lambda part: -_ITEM_BYTES[part.dtype])


def _header(stored: Sequence[Stored]) -> tuple[bytes, dict[str, int]]:
    """The header of a safetensors file (https://github.com/huggingface/safetensors#format), padded to 8 bytes, and
    where in the file each tensor begins."""
    entries: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    places: dict[str, int] = {}
    offset = 0
    for part in stored:
        end = offset + part.num_bytes
        entries[part.name] = {"dtype": part.dtype, "shape": list(part.shape), "data_offsets": [offset, end]}
        places[part.name] = offset
        offset = end
    text = json.dumps(entries, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    header = len(text).to_bytes(8, "little") + text
    return header, {name: len(header) + place for name, place in places.items()}


def _write(file: GgufFile, output: Output, stream: BinaryIO, places: dict[str, int]) -> Iterator[int]:
    parts = output.stored()
    written = [places[part.name] for part in parts]
    for arrays in _chunks(file, output):
        for i, array in enumerate(arrays):
            stream.seek(written[i])
            written[i] += stream.write(np.ascontiguousarray(array).data)
        yield sum(array.nbytes for array in arrays)


def _chunks(file: GgufFile, output: Output) -> Iterator[list[NDArray[Any]]]:
    """Its stored tensors, some rows at a time."""
    tensor = output.source
    if tensor is None:
        yield [np.zeros(output.shape, dtype=np.float32)]
        return
    blocks = file.blocks(tensor.name)
    if blocks.ndim == 1:  # a bias or a norm: its "rows" are single values
        values = dequantize(blocks[None], tensor.type_id)[0]
        yield [values if output.order is None else values[output.order]]
        return
    kept_bits = output.stored()[0].dtype in _HALVES
    rows_per_chunk = max(1, VALUES_PER_CHUNK // tensor.shape[-1])
    for start in range(0, len(blocks), rows_per_chunk):
        rows = slice(start, start + rows_per_chunk)
        chunk = blocks[rows] if output.order is None else blocks[output.order[rows]]
        if output.layout is not None:
            packed = pack(chunk, tensor.type_name)
            yield [part for part in (packed.values, packed.scales, packed.minimums) if part is not None]
        else:
            yield [chunk if kept_bits else dequantize(chunk, tensor.type_id)]
