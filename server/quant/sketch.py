"""A quantised layer on torch's `meta` device: what it would hold in memory on another, without holding it."""

from __future__ import annotations

import torch
from torch import Tensor

from server.quant import cuda, integer
from server.quant.formats import QuantizedWeight


class LinearSketch:
    """Implements server.quant.layer.LinearLayer, but for calls; holds the stored tensors until `settle`."""

    path = "sketch"

    def __init__(self, weight: QuantizedWeight, bias: Tensor | None, dtype: torch.dtype) -> None:
        self.out_features, self.in_features = weight.shape
        self.bias, self.format = bias, weight.format.name
        self._weight: QuantizedWeight | None = weight
        self._dtype = dtype
        self.tensors: list[Tensor] = []
        self.widened_bytes = 0

    def __call__(self, x: Tensor) -> Tensor:
        raise RuntimeError("a sketch of a layer computes nothing")

    def plain_weight(self) -> Tensor:
        """W [O, K], on the `meta` device."""
        return torch.empty(self.out_features, self.in_features, dtype=self._dtype, device="meta")

    def settle(self, device: torch.device) -> None:
        """Holds what the layer holds on `device`."""
        weight = self._weight
        if weight is None:
            return
        self._weight, self.tensors = None, held(weight, device.type, self._dtype)
        if device.type == "cuda":
            self.widened_bytes = cuda.widened_bytes(weight, self._dtype)


def held(weight: QuantizedWeight, device_type: str, dtype: torch.dtype) -> list[Tensor]:
    """Tensors on the `meta` device of the sizes of those that the weight's layer holds."""
    form, (rows, columns) = weight.format, weight.shape
    smooth = [] if weight.input_scales is None else [weight.input_scales]
    if device_type == "cpu":
        if integer.fits(form, columns) and integer.available():
            return [*smooth, _like(rows, columns, dtype=torch.int8), _like(rows)]
        if dtype == torch.float32 and form.group_size == 32 and form.activations == "int8-group" and not smooth:
            parts = [weight.values, weight.scales, weight.minimums]
            tensors = [part for part in parts if part is not None]
            # The layer has tiles of 16 outputs, scales in float16, and the stored tensors for who wants them plain.
            tiles = sum((2 if t.dtype.is_floating_point else 1) * t.shape[1] * -(-rows // 16) * 16 for t in tensors)
            return [*tensors, _like(tiles, dtype=torch.uint8)]
    if device_type == "cuda":
        return cuda.held(weight, dtype)
    return [*(smooth if form.activations != "none" else []), _like(rows, columns, dtype=dtype)]


def _like(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.empty(shape, dtype=dtype, device="meta")
