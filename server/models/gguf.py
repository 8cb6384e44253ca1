"""GGUF container reader: metadata and mapped tensor blocks. numpy only.

Format: https://github.com/ggml-org/ggml/blob/master/docs/gguf.md. The header is parsed in one pass over a
mapped buffer; `gguf.GGUFReader` builds several objects per vocabulary entry and takes seconds for the same file.
"""

from __future__ import annotations

import struct
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from server.models.errors import ModelSourceError

Bytes = NDArray[np.uint8]

MAGIC = b"GGUF"
SUPPORTED_VERSIONS = (2, 3)
DEFAULT_ALIGNMENT = 32
MAX_DIMENSIONS = 4
MAX_KEY_NESTING = 4

_TYPE_STRING, _TYPE_ARRAY = 8, 9
_SCALARS: dict[int, str] = {
    0: "<B", 1: "<b", 2: "<H", 3: "<h", 4: "<I", 5: "<i", 6: "<f", 7: "<?", 10: "<Q", 11: "<q", 12: "<d",
}  # fmt: skip

# id -> (name, values a block, bytes a block). Only types that `gguf.quants.dequantize` can read.
GGML_TYPES: dict[int, tuple[str, int, int]] = {
    0: ("F32", 1, 4),
    1: ("F16", 1, 2),
    2: ("Q4_0", 32, 18),
    3: ("Q4_1", 32, 20),
    6: ("Q5_0", 32, 22),
    7: ("Q5_1", 32, 24),
    8: ("Q8_0", 32, 34),
    10: ("Q2_K", 256, 84),
    11: ("Q3_K", 256, 110),
    12: ("Q4_K", 256, 144),
    13: ("Q5_K", 256, 176),
    14: ("Q6_K", 256, 210),
    16: ("IQ2_XXS", 256, 66),
    17: ("IQ2_XS", 256, 74),
    18: ("IQ3_XXS", 256, 98),
    19: ("IQ1_S", 256, 50),
    20: ("IQ4_NL", 32, 18),
    21: ("IQ3_S", 256, 110),
    22: ("IQ2_S", 256, 82),
    23: ("IQ4_XS", 256, 136),
    29: ("IQ1_M", 256, 56),
    30: ("BF16", 1, 2),
    34: ("TQ1_0", 256, 54),
    35: ("TQ2_0", 256, 66),
    39: ("MXFP4", 32, 17),
}


@dataclass(frozen=True, slots=True)
class GgufTensor:
    """One tensor of the file. `shape` is row-major (the last dimension is contiguous), in values, not in blocks."""

    name: str
    shape: tuple[int, ...]
    type_id: int
    offset: int
    num_bytes: int

    @property
    def type_name(self) -> str:
        return GGML_TYPES[self.type_id][0]


class GgufFile:
    """A mapped GGUF file. Raises `ModelSourceError` if it is no GGUF file, is damaged or cut off."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._bytes = _map(path)
        parser = _HeaderParser(path, self._bytes)
        self.metadata: Mapping[str, Any]
        self.tensors: Mapping[str, GgufTensor]
        self.metadata, self.tensors = parser.parse()

    @property
    def architecture(self) -> str:
        return str(self.metadata.get("general.architecture", ""))

    def field(self, suffix: str, default: Any = None) -> Any:
        """The architecture's own metadata value, for instance `field("block_count")` for `llama.block_count`."""
        return self.metadata.get(f"{self.architecture}.{suffix}", default)

    def blocks(self, name: str) -> Bytes:
        """The raw blocks of a tensor as stored, uint8 [*shape[:-1], bytes a row], mapped and read-only."""
        tensor = self.tensors[name]
        data = self._bytes[tensor.offset : tensor.offset + tensor.num_bytes]
        rows = prod(tensor.shape[:-1])
        return data.reshape(*tensor.shape[:-1], tensor.num_bytes // max(rows, 1))


def dequantize(blocks: Bytes, type_id: int) -> NDArray[np.float32]:
    """Blocks [rows, bytes a row] of one GGML type to float32 [rows, values a row]."""
    # Imported here because only a conversion needs it: a start from the cache does not pay for it.
    from gguf import GGMLQuantizationType
    from gguf.quants import dequantize as gguf_dequantize

    with np.errstate(invalid="ignore", over="ignore"):
        values = gguf_dequantize(np.ascontiguousarray(blocks), GGMLQuantizationType(type_id))
    return np.asarray(values, dtype=np.float32)


def _map(path: Path) -> Bytes:
    try:
        if path.stat().st_size < len(MAGIC):
            raise ModelSourceError(f"{path}: not a GGUF file (it is shorter than the 4-byte magic)")
        return np.asarray(np.memmap(path, mode="r"))
    except OSError as error:
        raise ModelSourceError(f"{path}: cannot be read: {error.strerror or error}") from error


class _HeaderParser:
    """One pass over the header: magic, counts, key-value pairs, tensor table."""

    def __init__(self, path: Path, data: Bytes) -> None:
        self._path = path
        self._view = data.data
        self._size = len(data)
        self._at = 0

    def parse(self) -> tuple[dict[str, Any], dict[str, GgufTensor]]:
        if bytes(self._view[:4]) != MAGIC:
            raise ModelSourceError(f"{self._path}: not a GGUF file (it starts with {bytes(self._view[:4])!r})")
        self._at = len(MAGIC)
        try:
            return self._parse_body()
        except (struct.error, UnicodeDecodeError) as error:
            raise self._damaged(f"{error}") from error

    def _parse_body(self) -> tuple[dict[str, Any], dict[str, GgufTensor]]:
        version = self._scalar("<I")
        if version not in SUPPORTED_VERSIONS:
            hint = "a big-endian file" if version & 0xFFFF == 0 else f"version {version}"
            raise ModelSourceError(f"{self._path}: {hint} of GGUF; versions {SUPPORTED_VERSIONS} are supported")
        num_tensors, num_pairs = self._count("tensors"), self._count("metadata pairs")
        metadata: dict[str, Any] = {}
        for _ in range(num_pairs):
            key = self._string()
            metadata[key] = self._value(self._scalar("<I"), 0)
        table = [self._tensor() for _ in range(num_tensors)]
        alignment = metadata.get("general.alignment", DEFAULT_ALIGNMENT)
        if not isinstance(alignment, int) or alignment < 1:
            raise self._damaged(f"general.alignment is {alignment!r}")
        start = -(-self._at // alignment) * alignment
        return metadata, {tensor.name: self._placed(tensor, start) for tensor in table}

    def _placed(self, tensor: GgufTensor, start: int) -> GgufTensor:
        offset = start + tensor.offset
        if offset + tensor.num_bytes > self._size:
            raise self._damaged(
                f"tensor {tensor.name!r} ends at byte {offset + tensor.num_bytes} but the file has {self._size}"
            )
        return GgufTensor(tensor.name, tensor.shape, tensor.type_id, offset, tensor.num_bytes)

    def _tensor(self) -> GgufTensor:
        name = self._string()
        num_dims = self._scalar("<I")
        if not 1 <= num_dims <= MAX_DIMENSIONS:
            raise self._damaged(f"tensor {name!r} has {num_dims} dimensions")
        shape = tuple(self._scalar("<Q") for _ in range(num_dims))[::-1]
        type_id, offset = self._scalar("<I"), self._scalar("<Q")
        if type_id not in GGML_TYPES:
            known = ", ".join(entry[0] for entry in GGML_TYPES.values())
            raise ModelSourceError(f"{self._path}: tensor {name!r} has GGML type {type_id}; supported: {known}")
        type_name, block, block_bytes = GGML_TYPES[type_id]
        if shape[-1] % block:
            raise self._damaged(f"tensor {name!r}: rows of {shape[-1]} values do not divide into {type_name} blocks")
        return GgufTensor(name, shape, type_id, offset, prod(shape) // block * block_bytes)

    def _value(self, kind: int, depth: int) -> Any:
        if kind == _TYPE_STRING:
            return self._string()
        if kind == _TYPE_ARRAY:
            return self._array(depth)
        if kind not in _SCALARS:
            raise self._damaged(f"metadata type {kind} is unknown")
        return self._scalar(_SCALARS[kind])

    def _array(self, depth: int) -> list[Any]:
        if depth >= MAX_KEY_NESTING:
            raise self._damaged("metadata arrays are nested too deeply")
        kind, length = self._scalar("<I"), self._count("array elements")
        if kind == _TYPE_STRING:
            return self._strings(length)
        if kind in _SCALARS:
            dtype = np.dtype(_SCALARS[kind])
            self._need(length * dtype.itemsize)
            values: list[Any] = np.frombuffer(self._view, dtype, length, self._at).tolist()
            self._at += length * dtype.itemsize
            return values
        read: Callable[[], Any] = lambda: self._value(kind, depth + 1)  # noqa: E731
        return [read() for _ in range(length)]

    def _strings(self, length: int) -> list[str]:
        # The vocabulary and the merges come through here: keep the loop lean.
        view, at, unpack = self._view, self._at, struct.Struct("<Q").unpack_from
        strings = []
        for _ in range(length):
            (num_bytes,) = unpack(view, at)
            at += 8
            if at + num_bytes > self._size:
                raise self._damaged("a string runs past the end of the file")
            strings.append(str(view[at : at + num_bytes], "utf-8"))
            at += num_bytes
        self._at = at
        return strings

    def _string(self) -> str:
        return self._strings(1)[0]

    def _scalar(self, fmt: str) -> Any:
        (value,) = struct.unpack_from(fmt, self._view, self._at)
        self._at += struct.calcsize(fmt)
        return value

    def _count(self, what: str) -> int:
        count = int(self._scalar("<Q"))
        if count > self._size:  # every element takes at least one byte
            raise self._damaged(f"it claims {count} {what}")
        return count

    def _need(self, num_bytes: int) -> None:
        if self._at + num_bytes > self._size:
            raise self._damaged("a metadata array runs past the end of the file")

    def _damaged(self, why: str) -> ModelSourceError:
        return ModelSourceError(f"{self._path}: damaged or incomplete GGUF file: {why}; download it again")
