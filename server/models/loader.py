"""Builds a network from a Hugging Face directory: our own definition where there is one, else transformers'."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any, Protocol

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from server.config import ConfigError
from server.models.base import TargetModel
from server.models.config import LLAMA_FAMILY, ModelConfig, UnsupportedModelError, architecture_of, parse_config
from server.models.errors import WeightsError
from server.models.foreign import ForeignTensors, foreign_dialect
from server.models.llama import Get, LlamaModel
from server.models.quantized import QuantizedTensors, formats_of
from server.models.random_weights import llama_weights
from server.models.source import ModelSource

__all__ = [
    "Checkpoint",
    "Tensors",
    "WeightsError",
    "load_model",
    "load_source",
    "pick_device",
    "pick_dtype",
    "tensors_of",
]


class Tensors(Protocol):
    """A network's weights by name."""

    def has(self, name: str) -> bool:
        """Whether there is a tensor of that name."""

    def get(self, name: str) -> Tensor:
        """The tensor, on the device of the network and, if floating point, in its dtype."""


class Checkpoint:
    """Tensors of a safetensors directory by name, mapped and read on demand."""

    def __init__(self, directory: Path, dtype: torch.dtype, device: torch.device) -> None:
        self._directory, self._dtype, self._device = directory, dtype, device
        self._files: dict[str, Any] = {}
        self._where = self._index()

    def _index(self) -> dict[str, str]:
        index = self._directory / "model.safetensors.index.json"
        if index.exists():
            return dict(json.loads(index.read_text())["weight_map"])
        where: dict[str, str] = {}
        for file in sorted(self._directory.glob("*.safetensors")):
            where.update(dict.fromkeys(self._open(file.name).keys(), file.name))
        if not where:
            raise WeightsError(f"{self._directory}: no safetensors file with tensors in it")
        return where

    def _open(self, name: str) -> Any:
        if name not in self._files:
            try:
                self._files[name] = safe_open(str(self._directory / name), framework="pt")
            except (OSError, SafetensorError) as e:
                raise WeightsError(f"{self._directory / name}: not a readable safetensors file ({e})") from e
        return self._files[name]

    def has(self, name: str) -> bool:
        """Whether the checkpoint holds a tensor of that name."""
        return name in self._where

    def names(self) -> list[str]:
        """Of all tensors."""
        return list(self._where)

    def file_of(self, name: str) -> Path:
        """The file that holds a tensor; the directory if none does."""
        return self._directory / self._where.get(name, "")

    def get(self, name: str) -> Tensor:
        """The tensor on the target's device, floating point in its dtype. Raises WeightsError if missing."""
        tensor = self._stored(name)
        # Integers, such as an EAGLE-3 head's map of token ids, would not survive a cast to bfloat16.
        return tensor.to(device=self._device, dtype=self._dtype if tensor.is_floating_point() else None)

    def read(self, name: str) -> Tensor:
        """The tensor as it is stored, on the target's device. Raises WeightsError if missing."""
        return self._stored(name).to(device=self._device)

    def _stored(self, name: str) -> Tensor:
        if name not in self._where:
            raise WeightsError(f"{self._directory}: tensor {name!r} is missing from the checkpoint")
        tensor: Tensor = self._open(self._where[name]).get_tensor(name)
        return tensor


def pick_device(name: str) -> torch.device:
    """`auto` is the first GPU where there is one, else the CPU. Raises ConfigError."""
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
    except RuntimeError:
        raise ConfigError(f"device: {name!r} is not valid; use auto, cpu, cuda or cuda:N") from None
    if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        raise ConfigError(f"device: {name!r} is not there; this torch sees {torch.cuda.device_count()} CUDA devices")
    return device


def pick_dtype(name: str, device: torch.device) -> torch.dtype:
    """`auto` is bfloat16 on a GPU and float32 on a CPU."""
    if name == "auto":
        return torch.float32 if device.type == "cpu" else torch.bfloat16
    dtype: torch.dtype = getattr(torch, name)
    return dtype


def load_source(source: ModelSource, device: torch.device, dtype: torch.dtype, max_positions: int) -> TargetModel:
    """The network of a model's files, or with weights drawn or made where it has none; see `load_model`.

    On torch's `meta` device no weights are read, drawn or made: the network has its shapes and no memory.
    """
    shapeless = source.tensors is None or architecture_of(source.config) not in LLAMA_FAMILY
    if source.kind not in ("random", "made") and shapeless:
        return load_model(source.directory, source.config, device, dtype, max_positions)
    quantised = formats_of(source.config) is not None  # then what is made has its shapes, on the `meta` device too
    drawn = source.kind == "random" or (source.kind == "made" and device.type == "meta" and not quantised)
    if drawn:
        config = parse_config(source.config)
        made = llama_weights(config, dtype, device)
        return LlamaModel(config, made.get, made.has, max_positions)
    return _llama(source.config, tensors_of(source, device, dtype), device, dtype, max_positions)


def _llama(
    raw: dict[str, Any], tensors: Tensors, device: torch.device, dtype: torch.dtype, max_positions: int
) -> TargetModel:
    """Our own network; a compiled step where all its layers are in a format that has one (`llama_cpu`)."""
    config = parse_config(raw)
    if not isinstance(tensors, QuantizedTensors | ForeignTensors):
        return LlamaModel(config, tensors.get, tensors.has, max_positions)
    compiled = _compiled(config, tensors.stored, tensors.has, max_positions, device, dtype)
    return compiled or LlamaModel(config, tensors.stored, tensors.has, max_positions)


def _compiled(
    config: ModelConfig,
    get: Get,
    has: Callable[[str], bool],
    max_positions: int,
    device: torch.device,
    dtype: torch.dtype,
) -> TargetModel | None:
    if device.type != "cpu" or dtype != torch.float32:
        return None
    from server.models.llama_cpu import LlamaCpuModel, cpu_weights, why_not  # numba, for those who need it

    weights = cpu_weights(config, get, has)
    if weights is None or why_not(config, weights) is not None:
        return None
    return LlamaCpuModel(config, weights, max_positions)


def tensors_of(source: ModelSource, device: torch.device, dtype: torch.dtype) -> Tensors:
    """Tensors of the source's files, or those that it makes. Raises WeightsError."""
    if source.tensors is None:
        return _checkpoint(source.directory, source.config, device, dtype)
    made = source.tensors(dtype, device)
    formats, dialect = formats_of(source.config), foreign_dialect(source.config, source.directory)
    if dialect is not None:
        return ForeignTensors(dialect, made, source.directory, dtype)
    if formats is None:
        plain: Tensors = made
        return plain
    return QuantizedTensors(formats, made.get, made.get, made.has, lambda name: source.directory, dtype)


def _checkpoint(directory: Path, raw: dict[str, Any], device: torch.device, dtype: torch.dtype) -> Tensors:
    """A directory's tensors, with its quantised layers if there are any."""
    files, formats = Checkpoint(directory, dtype, device), formats_of(raw)
    dialect = foreign_dialect(raw, directory)
    if dialect is not None:
        return ForeignTensors(dialect, files, directory, dtype)
    if formats is None:
        return files
    return QuantizedTensors(formats, files.read, files.get, files.has, files.file_of, dtype)


def load_model(
    directory: Path, raw: dict[str, Any], device: torch.device, dtype: torch.dtype, max_positions: int
) -> TargetModel:
    """Loads the network of `config.json` contents `raw`; positions up to `max_positions` can be served.

    Raises UnsupportedModelError, naming what works, or WeightsError.
    """
    arch = architecture_of(raw)
    if arch in LLAMA_FAMILY:
        return _llama(raw, _checkpoint(directory, raw, device, dtype), device, dtype, max_positions)
    from server.models.transformers_backend import load_transformers_model, supports  # heavy import, only when needed

    if not supports(raw):
        raise UnsupportedModelError(
            f"{arch} is not supported. Networks of our own: {', '.join(LLAMA_FAMILY)}. Through transformers: "
            "decoder-only models that use its attention interface (GPT-2, GPT-NeoX, StarCoder2, Phi, Gemma, OPT…)"
        )
    return load_transformers_model(directory, raw, device, dtype, max_positions)
