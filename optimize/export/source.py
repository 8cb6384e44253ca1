"""A directory of ours, tensor by tensor (names: server/quant/checkpoint.py)."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from safetensors import safe_open
from torch import Tensor

from optimize.export.errors import ExportError
from server.models.safetensors_index import load_index
from server.quant import checkpoint
from server.quant.formats import LinearFormat, QuantizedWeight

_PARTS = (checkpoint.VALUES, checkpoint.SCALES, checkpoint.MINIMUMS, checkpoint.INPUT_SCALES)


class Source:
    """`layers` are the quantised ones; `plain` the names of all tensors that belong to none of them, in order."""

    def __init__(self, directory: Path) -> None:
        """Raises ExportError for anything but a model that Outpace quantised, ModelSourceError for damaged files."""
        self.directory = directory
        self.config = _config(directory)
        self._entries = load_index(directory)
        self._files: dict[Path, Any] = {}
        try:
            found = checkpoint.layers_of(self.config)
            forms = {name: LinearFormat(**fields) for name, fields in (found or {}).items()}
        except (TypeError, ValueError) as error:
            raise ExportError(f"{directory / 'config.json'}: {error}") from error
        if not forms:
            raise ExportError(
                f"{directory}: is not a model that Outpace quantised; outpace optimize MODEL --recipe RECIPE makes one"
            )
        self.layers = forms
        parts = {f"{name}.{part}" for name in forms for part in _PARTS}
        self.plain = [name for name in self._entries if name not in parts]

    @property
    def kv_cache(self) -> str | None:
        """What the recipe said of the KV cache."""
        found: str | None = self.config["quantization_config"].get("kv_cache")
        return found

    def has(self, name: str) -> bool:
        """Whether there is a tensor of that name."""
        return name in self._entries

    def num_dimensions(self, name: str) -> int:
        """Of a tensor."""
        return len(self._entries[name].shape)

    def tensor(self, name: str) -> Tensor:
        """As it is stored."""
        file = self._entries[name].file
        if file not in self._files:
            self._files[file] = safe_open(str(file), framework="pt")
        tensor: Tensor = self._files[file].get_tensor(name)
        return tensor

    def input_scales(self, layer: str) -> Tensor | None:
        """What the layer's activations are multiplied by first, [K]."""
        name = f"{layer}.{checkpoint.INPUT_SCALES}"
        return self.tensor(name) if self.has(name) else None

    def layer(self, name: str) -> QuantizedWeight:
        """Raises ExportError for tensors that are missing or do not fit."""
        found = {part: self.tensor(f"{name}.{part}") if self.has(f"{name}.{part}") else None for part in _PARTS}
        values, scales = found[checkpoint.VALUES], found[checkpoint.SCALES]
        if values is None or scales is None:
            missing = checkpoint.VALUES if values is None else checkpoint.SCALES
            raise ExportError(f"{self.directory}: tensor {name}.{missing} is missing")
        try:
            return QuantizedWeight(
                self.layers[name], values, scales, found[checkpoint.MINIMUMS], found[checkpoint.INPUT_SCALES]
            )
        except ValueError as error:
            raise ExportError(f"{self.directory}: layer {name}: {error}") from error


def _config(directory: Path) -> dict[str, Any]:
    path = directory / "config.json"
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ExportError(f"{path}: cannot be read as JSON: {error}") from error
    if not isinstance(config, dict):
        raise ExportError(f"{path}: is not a JSON object")
    return config
