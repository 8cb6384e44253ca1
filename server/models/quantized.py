"""Reads a checkpoint's quantised layers; names and fields are those of `server.quant.checkpoint`."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor

from server.models.errors import WeightsError
from server.quant.checkpoint import INPUT_SCALES, MINIMUMS, SCALES, VALUES, layers_of
from server.quant.formats import FP8, LinearFormat, QuantizedWeight

Read = Callable[[str], Tensor]
Weight = Tensor | QuantizedWeight

_PARTS = (SCALES, MINIMUMS, INPUT_SCALES)
_DTYPES = {"fp8": FP8, "int8": torch.int8, "int4": torch.uint8}


class QuantizedTensors:
    """A checkpoint's tensors where some layers are quantised; implements server.models.loader.Tensors.

    `read` gives a tensor by name as it lies in the file, on the network's device; `plain` the same in the network's
    dtype. `get` dequantises, `stored` does not.
    """

    def __init__(
        self,
        formats: Mapping[str, LinearFormat],
        read: Read,
        plain: Read,
        has: Callable[[str], bool],
        file_of: Callable[[str], object],
        dtype: torch.dtype,
    ) -> None:
        self.formats = formats
        self._read, self._plain, self._has, self._file_of, self._dtype = read, plain, has, file_of, dtype

    def has(self, name: str) -> bool:
        """Whether there is a tensor of that name."""
        return self._has(name)

    def file_of(self, name: str) -> object:
        """Where the tensor lies, for messages."""
        return self._file_of(name)

    def get(self, name: str) -> Tensor:
        """The tensor in the network's dtype, dequantised if need be. Raises WeightsError."""
        found = self.stored(name)
        return found if isinstance(found, Tensor) else found.effective(self._dtype)

    def stored(self, name: str) -> Weight:
        """A quantised layer's weight as it is stored, any other tensor in the network's dtype.

        Raises WeightsError naming file and tensor: a scale is missing or not finite, a shape is wrong.
        """
        layer, _, part = name.rpartition(".")
        form = self.formats.get(layer) if part == VALUES else None
        return self._plain(name) if form is None else self._quantized(layer, form)

    def _quantized(self, layer: str, form: LinearFormat) -> QuantizedWeight:
        name = f"{layer}.{VALUES}"
        values = self._read(name)
        wanted = _DTYPES[form.weights]
        if values.is_meta and values.dtype != wanted:  # a header that was read without its exact type
            values = torch.empty(values.shape, dtype=wanted, device="meta")
        if values.dtype != wanted or values.dim() != 2:
            what = f"{str(values.dtype).removeprefix('torch.')} {list(values.shape)}"
            raise self._damaged(name, f"is {what}, but config.json says {form.name}")
        scales = {part: self._scales(f"{layer}.{part}", part) for part in _PARTS if _has_part(form, part)}
        columns = values.shape[1] * (2 if form.weights == "int4" else 1)
        smooth = scales.get(INPUT_SCALES)
        if smooth is not None and tuple(smooth.shape) != (columns,):
            raise self._damaged(f"{layer}.{INPUT_SCALES}", f"is {list(smooth.shape)}, not {[columns]}")
        try:
            return QuantizedWeight(form, values, scales[SCALES], scales.get(MINIMUMS), smooth)
        except ValueError as error:
            raise self._damaged(name, f"does not fit format {form.name}: {error}") from error

    def _scales(self, name: str, part: str) -> Tensor:
        if not self._has(name):
            raise self._damaged(name, "is missing from the checkpoint")
        tensor = self._read(name)
        if not tensor.is_floating_point():
            raise self._damaged(name, f"is {tensor.dtype}, not floating point")
        if not tensor.is_meta and not bool(torch.isfinite(tensor.float()).all()):
            raise self._damaged(name, "has values that are not finite")
        return tensor

    def _damaged(self, name: str, what: str) -> WeightsError:
        return WeightsError(f"{self._file_of(name)}: tensor {name!r} {what}")


def _has_part(form: LinearFormat, part: str) -> bool:
    return part == SCALES or (part == MINIMUMS and form.minimum) or (part == INPUT_SCALES and form.smooth)


def formats_of(config: Mapping[str, Any]) -> dict[str, LinearFormat] | None:
    """Formats of the layers that a `config.json` lists, None where it lists none.

    Raises WeightsError for a version or a format that is not known, naming the layer.
    """
    try:
        layers = layers_of(config)
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise WeightsError(f"config.json: {error}") from error
    if layers is None:
        return None
    formats: dict[str, LinearFormat] = {}
    for name, fields in layers.items():
        try:
            formats[name] = LinearFormat(**fields)
        except (TypeError, ValueError) as error:
            raise WeightsError(f"config.json: quantization_config: layer {name!r}: {error}") from error
    return formats
