"""What a model is, without its weights: from headers and configurations alone, nothing converted or downloaded whole.

Never imports torch itself; the sources that it makes do, when a network is sketched of them.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from types import MappingProxyType
from typing import TYPE_CHECKING, Any

from server.models.config import LLAMA_FAMILY, architecture_of
from server.models.embedded import EMBEDDED_ALIASES, EMBEDDED_NAME, embedded_gguf
from server.models.errors import ModelSourceError
from server.models.gguf import GgufFile
from server.models.gguf_convert import converted_shapes
from server.models.gguf_write import DEQUANTISED, Form
from server.models.safetensors_index import INDEX_NAME
from server.models.shapes import SHAPES, shape
from server.models.source import (
    HUB_FILES,
    HUB_ID,
    FormFor,
    ModelSource,
    SourceKind,
    form_of,
    is_gguf,
    resolve,
    what_works,
)

if TYPE_CHECKING:
    import torch
    from torch import Tensor

Shape = tuple[int, ...]
_INTEGERS = ("I", "U", "B")  # how safetensors' names of whole numbers and truth values begin; BF16 is told apart


class ShapedTensors:
    """Implements server.models.loader.Tensors on torch's `meta` device: tensors of known shapes without values."""

    def __init__(
        self, where: Path, shapes: Mapping[str, Shape], integers: Mapping[str, str], dtype: torch.dtype
    ) -> None:
        self._where, self._shapes, self._integers, self._dtype = where, shapes, integers, dtype

    def has(self, name: str) -> bool:
        """Whether there is a tensor of that name."""
        return name in self._shapes

    def get(self, name: str) -> Tensor:
        """The tensor. Raises ModelSourceError for a name that is not there."""
        import torch

        if name not in self._shapes:
            raise ModelSourceError(f"{self._where}: tensor {name!r} is missing from the checkpoint")
        whole = {"I8": torch.int8, "U8": torch.uint8}
        stored = self._integers.get(name, "")
        dtype = whole.get(stored, torch.int64) if stored.startswith(_INTEGERS) else self._dtype
        return torch.empty(self._shapes[name], dtype=dtype, device="meta")

    def read(self, name: str) -> Tensor:
        """The tensor in the type that the files have it in, where that is known."""
        import torch

        exact = {"I32": torch.int32, "F8_E4M3": torch.float8_e4m3fn}.get(self._integers.get(name, ""))
        return self.get(name) if exact is None else torch.empty(self._shapes[name], dtype=exact, device="meta")


def peek(spec: str, form: FormFor = DEQUANTISED) -> ModelSource:
    """The model that `resolve` with this `form` would find, and shapes beside: a name of `server.models.shapes`, or
    a directory that has a `config.json` and no weights yet.

    Its network can be sketched and not loaded. Raises `ModelSourceError` with what is wrong and what to do.
    """
    path = Path(spec).expanduser()
    if path.is_dir():
        return resolve(spec) if _has_weights(path) else _shape_only(spec, path.resolve().name, "directory")
    if path.is_file() and is_gguf(path):
        return _gguf(path, path.stem, "gguf", form_of(form, path))
    if path.is_file() or not spec.strip():
        return resolve(spec)
    if spec.lower() in EMBEDDED_ALIASES:
        path = embedded_gguf()
        return _gguf(path, EMBEDDED_NAME, "embedded", form_of(form, path))
    if spec in SHAPES:
        return _shape_only(spec, spec, "random")
    if HUB_ID.fullmatch(spec) and not spec.endswith(".gguf"):
        return _hub(spec)
    raise ModelSourceError(
        f"{spec}: there is no such file or directory; {what_works()}, or one of the shapes {', '.join(SHAPES)}"
    )


def _has_weights(directory: Path) -> bool:
    config = (directory / "config.json").is_file()
    return not config or (directory / INDEX_NAME).is_file() or any(directory.glob("*.safetensors"))


def _gguf(path: Path, name: str, kind: SourceKind, form: Form) -> ModelSource:
    config, stored = converted_shapes(GgufFile(path), form)
    integers = {part.name: part.dtype for part in stored if part.dtype in ("I8", "U8")}
    return _shaped(path, name, config, kind, {part.name: part.shape for part in stored}, integers)


def _shape_only(spec: str, name: str, kind: SourceKind) -> ModelSource:
    """A shape or a directory without weights: of our own networks the configuration says which there would be."""
    raw = shape(spec)

    def tensors(dtype: torch.dtype, device: torch.device) -> Any:
        from server.models.config import parse_config
        from server.models.random_weights import llama_weights

        return llama_weights(parse_config(raw), dtype, device)

    own = architecture_of(raw) in LLAMA_FAMILY
    return ModelSource(Path(spec), name, raw, kind, tensors if own else None)


def _hub(hub_id: str) -> ModelSource:
    """What lies in the hub's cache, else the headers alone (one small request a file)."""
    name = hub_id.split("/")[1]
    try:
        from huggingface_hub import get_safetensors_metadata, hf_hub_download, snapshot_download
        from huggingface_hub.errors import LocalEntryNotFoundError

        try:
            cached = Path(snapshot_download(hub_id, allow_patterns=list(HUB_FILES), local_files_only=True))
            if _has_weights(cached):
                found = resolve(str(cached))
                return ModelSource(found.directory, name, found.config, "hub")
        except LocalEntryNotFoundError:
            pass  # never fetched
        raw: dict[str, Any] = json.loads(Path(hf_hub_download(hub_id, "config.json")).read_text(encoding="utf-8"))
        files = get_safetensors_metadata(hub_id).files_metadata.values()
    except ModelSourceError:
        raise
    except Exception as error:  # the hub's client raises its own, the HTTP library's and the system's errors alike
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise ModelSourceError(
            f"{hub_id}: its configuration cannot be read from the Hugging Face hub: {reason}; "
            "there is no directory of this name either"
        ) from error
    entries = {tensor: entry for file in files for tensor, entry in file.tensors.items()}
    whole = {
        tensor: entry.dtype
        for tensor, entry in entries.items()
        if entry.dtype.startswith((*_INTEGERS, "F8")) and entry.dtype != "BF16"
    }
    return _shaped(Path(hub_id), name, raw, "hub", {t: tuple(e.shape) for t, e in entries.items()}, whole)


def _shaped(
    where: Path,
    name: str,
    raw: dict[str, Any],
    kind: SourceKind,
    shapes: Mapping[str, Shape],
    integers: Mapping[str, str] = MappingProxyType({}),
) -> ModelSource:
    def tensors(dtype: torch.dtype, device: torch.device) -> ShapedTensors:
        return ShapedTensors(where, shapes, integers, dtype)

    return ModelSource(where, name, raw, kind, tensors)
