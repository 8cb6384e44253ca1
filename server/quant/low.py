"""Linear layers in low precision by Triton kernels, on a GPU: alone, and as a network's fused steps take them.

Up to 64 tokens run skinny kernels. More are a prompt, or verification of many rows: 8-bit activations go to torch's
8-bit products; weights that meet activations as they come, and 4-bit ones, are first read again by the skinny kernel
and above `SKINNY_TOKENS` dequantised once for all rows. q and scales are the same on all these ways, so they differ by
the order of float32 sums; 4-bit weights also by a rounding: dequantised they are of the model's dtype, while the skinny
kernels multiply the stored integers and apply scales in float32.

What another format's layer has to offer to take part in fused steps is `Low`.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Protocol

import torch
from torch import Tensor

from server.kernels.eightbit_large import dequantized_groups, large_parts, plain_words, total
from server.kernels.eightbit_linear import gate_up8, linear8, linear8_parts
from server.kernels.eightbit_product import pack_groups
from server.kernels.eightbit_qkv import qkv_rope8
from server.kernels.eightbit_tiles import EightTile, Weight, candidates, weight8
from server.kernels.int4_product import WORD, pack_quads
from server.kernels.quantize import Precision, Quantized, Sums, quantize, silu_mul_quantize
from server.kernels.runtime import ceil_div, num_sms, supports_pdl
from server.kernels.skinny_qkv import Heads
from server.kernels.skinny_tiles import MAX_TOKENS, Kind
from server.quant.cuda import supported, widened_bytes
from server.quant.formats import QuantizedWeight

SKINNY_TOKENS = 256
"""Reading weights of 8 bits four times costs what dequantising them once does, and needs no room."""


class Choice(Protocol):
    """One way to compute a product, to be measured: a tile, say."""

    @property
    def name(self) -> str:
        """Says all of it, for a cache of measurements."""


@dataclass(frozen=True, slots=True)
class Library:
    """Not a kernel of our own: what many tokens take anyway."""

    name: str = "library"


LIBRARY = Library()


@dataclass(frozen=True, slots=True)
class Target:
    """Where a layer's queries, keys and values go; the arguments of skinny_qkv.norm_qkv_rope."""

    pool: Tensor
    positions: Tensor
    places: Tensor
    rotations: Tensor
    heads: Heads
    dtype: torch.dtype
    rotate: bool


class Low(Protocol):
    """A linear layer of the low-precision way: what it wants its input as, and its product.

    `tile` is one of `candidates`, or None; one that another layer offered is taken for None. `pdl`: the launch may
    overlap the one before (server/kernels/runtime.py).
    """

    @property
    def precision(self) -> Precision:
        """What rows of its input are quantised to."""

    @property
    def smooth(self) -> Tensor | None:
        """Factors [K] of its input's columns."""

    @property
    def in_features(self) -> int:
        """K."""

    @property
    def out_features(self) -> int:
        """N."""

    @property
    def path(self) -> str:
        """Which kernel runs."""

    @property
    def weight_bytes(self) -> int:
        """What is read of it in a step."""

    def candidates(self, kind: Kind, num_tokens: int, dtype: torch.dtype) -> Sequence[Choice]:
        """Ways to compute it for up to 64 tokens, the likeliest first; none where there is nothing to choose."""

    def queries(self, x: Quantized, target: Target, tile: Choice | None, pdl: bool) -> Tensor | None:
        """Of q, k and v: rotated queries [M, heads * head_dim], the others in the pool; None: not in one launch."""

    def parts(self, x: Quantized, dtype: torch.dtype, tile: Choice | None, pdl: bool) -> Sums:
        """Its result for a residual stream of `dtype`."""

    def whole(self, x: Quantized, dtype: torch.dtype, tile: Choice | None, pdl: bool) -> Tensor:
        """Its result [M, N] rounded to `dtype`."""

    def mixed(self, x: Quantized, dtype: torch.dtype, tile: Choice | None, pdl: bool) -> Sums | Tensor:
        """Of gate and up: SiLU(gate) * up [M, N / 2] of `dtype`, or what silu_mul_quantize makes it of."""

    def exactly(self) -> Low:
        """The same layer, a row's bits depending on that row alone. Raises ValueError where it cannot."""


@dataclass(frozen=True, slots=True)
class LowLinear:
    """Implements Low and server.quant.layer.LinearLayer for a stored weight; `path` names the kernel.

    `widened_bytes`: what steps of many tokens need beside. `exact`: one tile for all rows, 64 at a time, so that none
    of them is computed in another order for its company.
    """

    weight: Weight
    bias: Tensor | None
    precision: Precision
    smooth: Tensor | None
    path: str
    format: str = ""
    widened_bytes: int = 0
    exact: bool = False

    @classmethod
    def of(cls, stored: QuantizedWeight, bias: Tensor | None = None, dtype: torch.dtype = torch.bfloat16) -> LowLinear:
        """Repacks what has to be, for a model of `dtype`. Raises ValueError for a format that is not `supported`."""
        form = stored.format
        if not supported(form) or form.activations == "int8-group":
            raise ValueError(f"format {form.name} has no kernel here")
        if form.group_size is None:
            weight = weight8(stored.values, stored.scales)
        elif form.activations == "none":
            packed, scales = pack_quads(stored.integers(), stored.scales, stored.minimums, form.group_size)
            weight = Weight(packed, scales, stored.shape[1], form.group_size, form.minimum)
        else:
            packed, scales = pack_groups(stored.numbers(), stored.scales, form.group_size, form.activations)
            weight = Weight(packed, scales, stored.shape[1], form.group_size)
        smooth = None if stored.input_scales is None else stored.input_scales.float()
        return cls(
            weight, bias, form.activations, smooth, f"triton-{form.name}", form.name, widened_bytes(stored, dtype)
        )

    @property
    def in_features(self) -> int:
        """K."""
        return self.weight.columns

    @property
    def out_features(self) -> int:
        """N."""
        return self.weight.rows

    @property
    def weight_bytes(self) -> int:
        """See Low."""
        return self.weight.values.nbytes

    def __call__(self, x: Tensor) -> Tensor:
        """Maps x [N, K] to [N, O] in its dtype, by itself."""
        if len(x) == 0:
            return x.new_empty(0, self.out_features)
        pdl = supports_pdl(x.device)
        return self.whole(self._ready(x, pdl), x.dtype, None, pdl)

    def gated(self, x: Tensor) -> Tensor:
        """SiLU(g) * u [N, O / 2] in x's dtype, where its outputs for x [N, K] are g, then u."""
        if len(x) == 0:
            return x.new_empty(0, self.out_features // 2)
        pdl = supports_pdl(x.device)
        found = self.mixed(self._ready(x, pdl), x.dtype, None, pdl)
        return silu_mul_quantize(found, "none", x.dtype, pdl=pdl).values if isinstance(found, Sums) else found

    def _ready(self, x: Tensor, pdl: bool) -> Quantized:
        x = x.contiguous()
        plain = self.precision == "none" and self.smooth is None
        return Quantized(x, None) if plain else quantize(x, self.precision, self.smooth, pdl=pdl)

    def plain_weight(self) -> Tensor:
        """W [O, K] float32 with the factors of its input, a copy."""
        weight = self.weight
        if weight.per == WORD:
            plain = plain_words(weight, torch.float32)
        elif weight.group:
            plain = dequantized_groups(weight, torch.float8_e4m3fn if self.precision == "fp8" else torch.int8)
        else:
            plain = weight.values.float() * weight.scales[:, None]
        return plain if self.smooth is None else plain * self.smooth

    def exactly(self) -> LowLinear:
        """See Low."""
        return replace(self, exact=True)

    def candidates(self, kind: Kind, num_tokens: int, dtype: torch.dtype) -> Sequence[Choice]:
        """See Low."""
        if self.exact:
            return ()
        n = self.out_features // (2 if kind is Kind.GATE_UP else 1)
        size = 1 if self.precision != "none" else dtype.itemsize
        found: list[Choice] = [
            *candidates(kind, num_tokens, n, self.in_features, size, self.weight.group, self.weight.per)
        ]
        many = num_tokens > 16 and self.precision != "none" and not self.weight.group
        return [*found, LIBRARY] if many else found

    def queries(self, x: Quantized, target: Target, tile: Choice | None, pdl: bool) -> Tensor | None:
        """See Low."""
        if self.exact or tile is LIBRARY or len(x.values) > MAX_TOKENS:
            return None
        t = target
        return qkv_rope8(
            x, self.weight, self.bias, t.pool, t.positions, t.places, t.rotations, t.heads, t.dtype,
            rotate=t.rotate, tile=_eight(tile), pdl=pdl, settled=pdl,
        )  # fmt: skip

    def parts(self, x: Quantized, dtype: torch.dtype, tile: Choice | None, pdl: bool) -> Sums:
        """See Low."""
        if len(x.values) == 0:
            return Sums(torch.empty(1, 0, self.out_features, dtype=dtype, device=x.values.device))
        if not self._skinny(x, tile):
            return large_parts(x, self.weight, dtype, self.bias)
        chunks = [linear8_parts(rows, self.weight, None, tile=self._tile(tile, x), pdl=pdl) for rows in _chunks(x)]
        return Sums(_joined([chunk.parts for chunk in chunks], 1), bias=self.bias)

    def whole(self, x: Quantized, dtype: torch.dtype, tile: Choice | None, pdl: bool) -> Tensor:
        """See Low."""
        if len(x.values) == 0:
            return torch.empty(0, self.out_features, dtype=dtype, device=x.values.device)
        if not self._skinny(x, tile):
            return total(large_parts(x, self.weight, dtype, self.bias), dtype)
        chunks = [
            linear8(rows, self.weight, dtype, self.bias, tile=self._tile(tile, x) or self._filling(rows), pdl=pdl)
            for rows in _chunks(x)
        ]
        return _joined(chunks, 0)

    def mixed(self, x: Quantized, dtype: torch.dtype, tile: Choice | None, pdl: bool) -> Sums | Tensor:
        """See Low."""
        if len(x.values) == 0:
            return torch.empty(0, self.out_features // 2, dtype=dtype, device=x.values.device)
        if not self._skinny(x, tile):
            return large_parts(x, self.weight, dtype, self.bias)
        tile = self._tile(tile, x, pair=True)
        return _joined([gate_up8(c, self.weight, dtype, self.bias, tile=tile, pdl=pdl) for c in _chunks(x)], 0)

    def _skinny(self, x: Quantized, tile: Choice | None) -> bool:
        """Whether the skinny kernels compute it, 64 rows at a time."""
        if self.exact:
            return True
        widened = self.precision == "none" or self.weight.group > 0
        return tile is not LIBRARY and len(x.values) <= (SKINNY_TOKENS if widened else MAX_TOKENS)

    def _filling(self, x: Quantized) -> EightTile:
        """The likeliest tile that gives every multiprocessor a program, or the one with the most."""
        size = x.values.element_size()
        w = self.weight
        found = candidates(Kind.HEAD, len(x.values), w.rows, w.columns, size, w.group, w.per)
        enough = num_sms(x.values.device)
        fills = [t for t in found if ceil_div(self.out_features, t.block_n) >= enough]
        return fills[0] if fills else min(found, key=lambda t: t.block_n)

    def _tile(self, tile: Choice | None, x: Quantized, *, pair: bool = False) -> EightTile | None:
        return exact_tile(self.weight, x.values.element_size(), pair=pair) if self.exact else _eight(tile)


def exact_tile(weight: Weight, x_size: int, *, pair: bool = False) -> EightTile:
    """The tile of deterministic mode: always 64 rows of x, so one instruction and one order of sums; K in one part.

    `x_size`: bytes of an element of x.
    """
    if weight.columns <= 128 and not weight.group:
        return EightTile(16, 64, num_stages=2, rows=MAX_TOKENS)
    # Four groups of 64 rows of x take most of the shared memory.
    stages = 4 if weight.per != WORD else 2 if weight.group * x_size <= 256 else 1
    return EightTile(32 if pair else 64, 128, swap=True, num_stages=stages, rows=MAX_TOKENS)


def _eight(tile: Choice | None) -> EightTile | None:
    return tile if isinstance(tile, EightTile) else None


def _chunks(x: Quantized) -> list[Quantized]:
    """Up to 64 rows each."""
    starts = range(0, len(x.values), MAX_TOKENS)
    return [x] if len(starts) == 1 else [rows_of(x, start, MAX_TOKENS) for start in starts]


def rows_of(x: Quantized, start: int, count: int) -> Quantized:
    """Some of the rows, not copied."""
    return Quantized(x.values[start : start + count], None if x.scales is None else x.scales[start : start + count])


def _joined(tensors: list[Tensor], dim: int) -> Tensor:
    return tensors[0] if len(tensors) == 1 else torch.cat(tensors, dim)
