"""A checkpoint that another project quantised, as tensors of our networks (`server.quant.foreign` reads the layers)."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor

from server.models.config import UnsupportedModelError
from server.models.errors import WeightsError
from server.models.quantized import Weight
from server.quant.foreign.base import Dialect, ForeignCheckpointError
from server.quant.foreign.detect import foreign_layers

_WEIGHT = ".weight"
_INSTEAD = ("qweight", "weight_packed")
"""What dialects store in place of `weight`."""

log = logging.getLogger(__name__)


class Files(Protocol):
    """A checkpoint's tensors."""

    def has(self, name: str) -> bool:
        """Whether there is a tensor of that name."""

    def get(self, name: str) -> Tensor:
        """On the network's device, floating point in its dtype."""

    def read(self, name: str) -> Tensor:
        """On the network's device, as it is stored."""


class ForeignTensors:
    """Implements server.models.loader.Tensors, and `stored` like server.models.quantized.QuantizedTensors."""

    def __init__(self, dialect: Dialect, files: Files, where: Path, dtype: torch.dtype) -> None:
        self._dialect, self._files, self._where, self._dtype = dialect, files, where, dtype

    def has(self, name: str) -> bool:
        """Whether there is a tensor of that name, or a quantised weight."""
        layer = name.removesuffix(_WEIGHT)
        packed = name.endswith(_WEIGHT) and any(self._files.has(f"{layer}.{part}") for part in _INSTEAD)
        return packed or self._files.has(name)

    def get(self, name: str) -> Tensor:
        """The tensor in the network's dtype, dequantised if need be. Raises WeightsError."""
        found = self.stored(name)
        return found if isinstance(found, Tensor) else found.effective(self._dtype)

    def stored(self, name: str) -> Weight:
        """A quantised layer's weight as it is stored, any other tensor in the network's dtype. Raises WeightsError."""
        found = None
        if name.endswith(_WEIGHT):
            try:
                found = self._dialect.weight(self._files, name.removesuffix(_WEIGHT))
            except ForeignCheckpointError as error:
                raise WeightsError(f"{self._where}: {self._dialect.name}: {error}") from error
        return self._files.get(name) if found is None else found


def foreign_dialect(raw: Mapping[str, Any], directory: Path) -> Dialect | None:
    """The dialect of a `config.json`, None if nobody else quantised the model; says in the log what is read otherwise.

    Raises UnsupportedModelError, naming the field and what works.
    """
    try:
        dialect = foreign_layers(raw, directory)
    except ForeignCheckpointError as error:
        raise UnsupportedModelError(f"{directory / 'config.json'}: {error}") from error
    if dialect is not None:
        log.info("%s: quantised layers in the layout of %s", directory, dialect.name)
        for notice in dialect.notices:
            log.warning("%s: %s", directory, notice)
    return dialect
