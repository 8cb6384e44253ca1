"""Any linear layer as fused steps of low precision take it (`server.quant.low.Low`): plain, joined and others."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Protocol, cast

import torch
import torch.nn.functional as F
from torch import Tensor

from server.kernels.invariant import linear as invariant_linear
from server.kernels.quantize import Precision, Quantized, Sums, quantize
from server.kernels.skinny import norm_linear
from server.kernels.skinny_scaled import Scaled, prescale, square_columns
from server.kernels.skinny_tiles import MAX_TOKENS, Kind, TileConfig, configs_for
from server.quant.build import Joined
from server.quant.dense import Linear
from server.quant.dequantized import DequantizedLinear
from server.quant.layer import LinearLayer
from server.quant.low import LIBRARY, Choice, Low, Target


def low_of(layer: LinearLayer, *, exact: bool = False) -> Low:
    """The layer for fused steps; its weights are shared. `exact`: a row's bits depend on that row alone.

    Raises ValueError for one that cannot promise that.
    """
    if isinstance(layer, Linear):
        return DenseLinear(layer.weight, layer.bias, exact=exact)
    if isinstance(layer, Joined):
        return JoinedLow([low_of(part, exact=exact) for part in layer.parts])
    if isinstance(layer, DequantizedLinear):
        return OtherLinear(layer).exactly() if exact else OtherLinear(layer)
    low = cast("Low", layer)  # what else there is on a GPU
    return low.exactly() if exact else low


class _Rows(Protocol):
    """What is asked of a layer that takes rows in the model's dtype."""

    def whole(self, x: Quantized, dtype: torch.dtype, tile: Choice | None, pdl: bool) -> Tensor:
        """See Low."""


class _Plain:
    """What layers have in common whose input is not quantised by who calls them."""

    precision: Precision = "none"
    smooth: Tensor | None = None

    def queries(self, x: Quantized, target: Target, tile: Choice | None, pdl: bool) -> Tensor | None:
        """See Low."""
        return None

    def parts(self: _Rows, x: Quantized, dtype: torch.dtype, tile: Choice | None, pdl: bool) -> Sums:
        """See Low."""
        return Sums(self.whole(x, dtype, tile, pdl)[None])

    def mixed(self: _Rows, x: Quantized, dtype: torch.dtype, tile: Choice | None, pdl: bool) -> Sums | Tensor:
        """See Low."""
        return Sums(self.whole(x, dtype, tile, pdl)[None])

    def candidates(self, kind: Kind, num_tokens: int, dtype: torch.dtype) -> Sequence[Choice]:
        """See Low."""
        return ()


@dataclass(frozen=True)
class DenseLinear(_Plain):
    """Implements Low for a layer that stays in the model's dtype: the head, say."""

    weight: Tensor
    bias: Tensor | None = None
    path: str = "torch"
    exact: bool = False

    @property
    def in_features(self) -> int:
        """K."""
        return self.weight.shape[1]

    @property
    def out_features(self) -> int:
        """N."""
        return self.weight.shape[0]

    @property
    def weight_bytes(self) -> int:
        """See Low."""
        return self.weight.nbytes

    def exactly(self) -> DenseLinear:
        """See Low."""
        return replace(self, exact=True)

    def candidates(self, kind: Kind, num_tokens: int, dtype: torch.dtype) -> Sequence[Choice]:
        """See Low."""
        if self.exact:
            return ()
        n, k = self.weight.shape
        return [*configs_for(Kind.HEAD, num_tokens, n, k, dtype.itemsize), LIBRARY]

    def whole(self, x: Quantized, dtype: torch.dtype, tile: Choice | None, pdl: bool) -> Tensor:
        """See Low."""
        values = x.values
        if self.exact:
            return invariant_linear(values, self.weight, self.bias)
        if not isinstance(tile, TileConfig) or not 1 <= len(values) <= MAX_TOKENS:
            return F.linear(values, self.weight, self.bias)
        # The kernel divides by a norm (`skinny_scaled.inverse_rms`): with these sums and this eps by 1.
        scaled = Scaled(values, self._squares[: len(values)])
        eps = prescale(self.weight.dtype) ** -2
        return norm_linear(scaled, eps, self.weight, self.bias, config=tile, pdl=pdl)

    @cached_property
    def _squares(self) -> Tensor:
        columns = square_columns(self.in_features)
        return torch.zeros(MAX_TOKENS, columns, dtype=torch.float32, device=self.weight.device)


@dataclass(frozen=True)
class JoinedLow(_Plain):
    """Layers of one input in formats that differ; each quantises it for itself."""

    layers: Sequence[Low]

    @property
    def path(self) -> str:
        """Which kernels run."""
        return " | ".join(dict.fromkeys(layer.path for layer in self.layers))

    @property
    def in_features(self) -> int:
        """K."""
        return self.layers[0].in_features

    @property
    def out_features(self) -> int:
        """N, of all of them."""
        return sum(layer.out_features for layer in self.layers)

    @property
    def weight_bytes(self) -> int:
        """See Low."""
        return sum(layer.weight_bytes for layer in self.layers)

    def exactly(self) -> JoinedLow:
        """See Low."""
        return JoinedLow([layer.exactly() for layer in self.layers])

    def whole(self, x: Quantized, dtype: torch.dtype, tile: Choice | None, pdl: bool) -> Tensor:
        """See Low."""
        found = []
        for layer in self.layers:
            plain = layer.precision == "none" and layer.smooth is None
            own = x if plain else quantize(x.values, layer.precision, layer.smooth, pdl=pdl)
            found.append(layer.whole(own, dtype, None, pdl))
        return torch.cat(found, dim=-1)


@dataclass(frozen=True)
class OtherLinear(_Plain):
    """A layer without a low-bit kernel: it takes rows as they come and sees to the rest itself."""

    layer: LinearLayer

    @property
    def path(self) -> str:
        """Which kernel runs."""
        return self.layer.path

    @property
    def in_features(self) -> int:
        """K."""
        return self.layer.in_features

    @property
    def out_features(self) -> int:
        """N."""
        return self.layer.out_features

    @property
    def weight_bytes(self) -> int:
        """See Low; as if it were of 16 bits."""
        return 2 * self.in_features * self.out_features

    def exactly(self) -> OtherLinear:
        """Raises ValueError: its products are a library's."""
        raise ValueError(f"deterministic: there is no such kernel for {self.layer.format} ({self.layer.path})")

    def whole(self, x: Quantized, dtype: torch.dtype, tile: Choice | None, pdl: bool) -> Tensor:
        """See Low."""
        return self.layer(x.values)
