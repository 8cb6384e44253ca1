"""Which file of a directory holds which tensor, from the safetensors headers alone. Never imports torch.

Format: https://github.com/huggingface/safetensors#format.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any

from server.models.errors import ModelSourceError

SINGLE_NAME = "model.safetensors"
INDEX_NAME = "model.safetensors.index.json"
_MAX_HEADER_BYTES = 100_000_000  # the limit of the reference implementation
_DTYPE_BITS = {
    "F64": 64, "I64": 64, "U64": 64, "C64": 64, "F32": 32, "I32": 32, "U32": 32, "BF16": 16, "F16": 16, "I16": 16,
    "U16": 16, "F8_E5M2": 8, "F8_E4M3": 8, "F8_E8M0": 8, "F8_E4M3FNUZ": 8, "F8_E5M2FNUZ": 8, "I8": 8, "U8": 8,
    "BOOL": 8, "F6_E2M3": 6, "F6_E3M2": 6, "F4": 4,
}  # fmt: skip


@dataclass(frozen=True, slots=True)
class TensorEntry:
    """Where a tensor lies: open `file` with `safetensors.safe_open` to map it. `dtype` is safetensors' name."""

    file: Path
    dtype: str
    shape: tuple[int, ...]


def load_index(directory: Path) -> dict[str, TensorEntry]:
    """Every tensor of the model in `directory`, single-file or sharded.

    Raises `ModelSourceError` if a shard is missing, a header is damaged, a file is cut off, or the index names a
    tensor that its shard does not hold.
    """
    index = directory / INDEX_NAME
    if not index.is_file():
        return _merged([read_header(file) for file in _unsharded_files(directory)], directory)
    weight_map = _weight_map(index)
    files = {name: directory / name for name in sorted(set(weight_map.values()))}
    missing = [name for name, file in files.items() if not file.is_file()]
    if missing:
        raise ModelSourceError(f"{directory}: {len(missing)} of {len(files)} shards missing, first {missing[0]}")
    headers = {name: read_header(file) for name, file in files.items()}
    entries = {}
    for tensor, name in weight_map.items():
        if tensor not in headers[name]:
            raise ModelSourceError(f"{index}: says that {tensor} is in {name}, where it is not")
        entries[tensor] = headers[name][tensor]
    return entries


def read_header(file: Path) -> dict[str, TensorEntry]:
    """The tensors of one safetensors file. Raises `ModelSourceError` if the header or the file's length is wrong."""
    try:
        size = file.stat().st_size
        with file.open("rb") as stream:
            length = int.from_bytes(stream.read(8), "little")
            if size < 8 or not 2 <= length <= min(size - 8, _MAX_HEADER_BYTES):
                raise _damaged(file, f"its header claims {length} bytes, the file has {size}")
            header = json.loads(stream.read(length))
    except OSError as error:
        raise ModelSourceError(f"{file}: cannot be read: {error.strerror or error}") from error
    except ValueError as error:
        if isinstance(error, ModelSourceError):
            raise
        raise _damaged(file, "its header is not JSON") from error
    if not isinstance(header, dict):
        raise _damaged(file, "its header is not a JSON object")
    header.pop("__metadata__", None)
    return {name: _entry(file, name, value, size - 8 - length) for name, value in header.items()}


def _entry(file: Path, name: str, value: Any, data_size: int) -> TensorEntry:
    try:
        dtype, shape, (start, end) = value["dtype"], tuple(int(n) for n in value["shape"]), value["data_offsets"]
        bits = _DTYPE_BITS[dtype]
    except (KeyError, TypeError, ValueError) as error:
        raise _damaged(file, f"the entry of {name} is malformed ({error})") from error
    if not 0 <= start <= end or (end - start) * 8 != prod(shape) * bits:
        raise _damaged(file, f"the entry of {name} has offsets that do not fit its shape")
    if end > data_size:
        raise _damaged(file, f"{name} ends at byte {end} of the data, which has {data_size}: the file is cut off")
    return TensorEntry(file, dtype, shape)


def _unsharded_files(directory: Path) -> list[Path]:
    single = directory / SINGLE_NAME
    return [single] if single.is_file() else sorted(directory.glob("*.safetensors"))


def _merged(headers: list[dict[str, TensorEntry]], directory: Path) -> dict[str, TensorEntry]:
    entries: dict[str, TensorEntry] = {}
    for header in headers:
        twice = entries.keys() & header.keys()
        if twice:
            raise ModelSourceError(
                f"{directory}: {min(twice)} is in two safetensors files and there is no {INDEX_NAME}"
            )
        entries.update(header)
    return entries


def _weight_map(index: Path) -> dict[str, str]:
    try:
        weight_map = json.loads(index.read_text(encoding="utf-8"))["weight_map"]
        names = {str(tensor): str(name) for tensor, name in weight_map.items()}
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise ModelSourceError(f"{index}: cannot be read as an index of safetensors files: {error!r}") from error
    outside = [name for name in names.values() if Path(name).name != name]
    if outside:
        raise ModelSourceError(f"{index}: names a file outside its directory: {outside[0]}")
    return names


def _damaged(file: Path, why: str) -> ModelSourceError:
    return ModelSourceError(f"{file}: damaged or incomplete safetensors file: {why}; download it again")
