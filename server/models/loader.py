"""Builds a network from a Hugging Face directory: our own definition where there is one, else transformers'."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, Protocol

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from server.config import ConfigError
from server.models.base import TargetModel
from server.models.config import LLAMA_FAMILY, UnsupportedModelError, architecture_of, parse_config
from server.models.llama import LlamaModel
from server.models.random_weights import llama_weights
from server.models.source import ModelSource


class WeightsError(ValueError):
    """A checkpoint lacks a tensor or holds a damaged one; the message names file and tensor."""


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

    def file_of(self, name: str) -> Path:
        """The file that holds a tensor; the directory if none does."""
        return self._directory / self._where.get(name, "")

    def get(self, name: str) -> Tensor:
        """The tensor on the target's device, floating point in its dtype. Raises WeightsError if missing."""
        if name not in self._where:
            raise WeightsError(f"{self._directory}: tensor {name!r} is missing from the checkpoint")
        tensor: Tensor = self._open(self._where[name]).get_tensor(name)
        # Integers, such as an EAGLE-3 head's map of token ids, would not survive a cast to bfloat16.
        return tensor.to(device=self._device, dtype=self._dtype if tensor.is_floating_point() else None)


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
    """The network of a model's files, or with weights drawn or made where it has none; see `load_model`."""
    if source.kind not in ("random", "made"):
        return load_model(source.directory, source.config, device, dtype, max_positions)
    config = parse_config(source.config)
    weights = llama_weights(config, dtype, device) if source.kind == "random" else tensors_of(source, device, dtype)
    return LlamaModel(config, weights.get, weights.has, max_positions)


def tensors_of(source: ModelSource, device: torch.device, dtype: torch.dtype) -> Tensors:
    """Tensors of the source's files, or those that it makes. Raises WeightsError."""
    if source.tensors is None:
        return Checkpoint(source.directory, dtype, device)
    made: Tensors = source.tensors(dtype, device)
    return made


def load_model(
    directory: Path, raw: dict[str, Any], device: torch.device, dtype: torch.dtype, max_positions: int
) -> TargetModel:
    """Loads the network of `config.json` contents `raw`; positions up to `max_positions` can be served.

    Raises UnsupportedModelError, naming what works, or WeightsError.
    """
    arch = architecture_of(raw)
    if arch in LLAMA_FAMILY:
        checkpoint = Checkpoint(directory, dtype, device)
        return LlamaModel(parse_config(raw), checkpoint.get, checkpoint.has, max_positions)
    from server.models.transformers_backend import load_transformers_model, supports  # heavy import, only when needed

    if not supports(raw):
        raise UnsupportedModelError(
            f"{arch} is not supported. Networks of our own: {', '.join(LLAMA_FAMILY)}. Through transformers: "
            "decoder-only models that use its attention interface (GPT-2, GPT-NeoX, StarCoder2, Phi, Gemma, OPT…)"
        )
    return load_transformers_model(directory, raw, device, dtype, max_positions)
