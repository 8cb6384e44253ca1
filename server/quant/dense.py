"""Linear layers with unquantised weights.

On a CPU in float32 the weight is prepacked once for oneDNN (the operator that torch.compile's own CPU backend
uses). Plain `F.linear` repacks or streams badly at 2 to 16 rows: measured on two cores, one pass over SmolLM2-135M's
linears takes 50 / 120 / 98 ms at 1 / 3 / 8 rows unpacked and 22 / 18 / 24 ms packed, so verifying a few drafts
costs what one token costs. Packed results are also bit-identical for any number of rows from 2 upwards (each row has
its own reduction over K; at 1 row oneDNN may split K), which is what makes speculation bit-exact on the CPU; hence
`MIN_PACKED_ROWS`. A single row is computed twice: callers that pad a whole step to that many rows pay nothing.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

MIN_PACKED_ROWS = 4
"""Smaller steps are padded to this.

With AVX-512, one pass takes 26 ms at 2 rows and 18 ms at 4; with AVX2 29 and 30 ms.
"""
PACK_HINT_ROWS = 8
"""Row count the packed layout is chosen for; measured flat from 8 to 32."""


class Linear:
    """`y = x Wᵀ + b` for x [N, K], W [O, K] and optional b [O]; `path` names the kernel in use."""

    __slots__ = ("_run", "bias", "in_features", "out_features", "path", "weight")

    def __init__(self, weight: Tensor, bias: Tensor | None = None) -> None:
        self.out_features, self.in_features = weight.shape
        self.bias = bias
        packed = _pack(weight)
        self.weight = weight if packed is None else packed
        self.path = "torch" if packed is None else "onednn-packed"
        self._run = _plain if packed is None else _packed_call

    def __call__(self, x: Tensor) -> Tensor:
        return self._run(x, self.weight, self.bias)

    @property
    def format(self) -> str:
        """The weight's dtype."""
        return str(self.weight.dtype).removeprefix("torch.")

    @property
    def min_rows(self) -> int:
        """Smaller steps are padded to this by callers that would otherwise compute a row twice in each layer."""
        return MIN_PACKED_ROWS if self._run is _packed_call else 1

    def plain_weight(self) -> Tensor:
        """W [O, K] as it was given; a copy where it is packed."""
        return self.weight.to_dense() if self.weight.is_mkldnn else self.weight


def as_dense(layer: object) -> Linear:
    """A layer whose plain weight a kernel reads. Raises TypeError for another."""
    if isinstance(layer, Linear):
        return layer
    raise TypeError(f"{type(layer).__name__} has no plain weight")


def _plain(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    return F.linear(x, weight, bias)


def _packed_call(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    if x.shape[0] == 1:
        return _packed_call(x.expand(MIN_PACKED_ROWS, -1), weight, bias)[:1]
    out: Tensor = torch.ops.mkldnn._linear_pointwise.default(x, weight, bias, "none", [], "")
    return out


def packing_available() -> bool:
    """Whether this torch build has oneDNN's prepacked linear for float32 on the CPU."""
    return bool(
        torch.backends.mkldnn.is_available()
        and hasattr(torch.ops.mkldnn, "_reorder_linear_weight")
        and hasattr(torch.ops.mkldnn, "_linear_pointwise")
    )


def _pack(weight: Tensor) -> Tensor | None:
    if weight.device.type != "cpu" or weight.dtype != torch.float32 or not packing_available():
        return None
    reorder: Callable[[Tensor, int], Tensor] = torch.ops.mkldnn._reorder_linear_weight
    return reorder(weight.contiguous(), PACK_HINT_ROWS)
