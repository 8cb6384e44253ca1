"""A Llama layer whose linear layers are in low precision, on a GPU: what takes the place of llama_kernels' two ways.

Nine launches for up to 64 tokens, each overlapping the end of the one before:

    norm + quantise | qkv + rotary + write to the pool | attention | quantise | out
    residual + norm + quantise | gate, up + SiLU | quantise | down          (whose residual is the next layer's first)

Products leave their result in float32 parts; the norm that follows adds them to the residual stream. A linear layer
whose activations are not quantised needs no "quantise", and takes its input in the model's dtype. Each linear layer has
its own format, so layers may be mixed. More tokens go through torch's products (eightbit_large.py), same launches
between.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Protocol

import torch
import torch.nn.functional as F
from torch import Tensor

from server.kernels.eightbit_large import large_parts, total
from server.kernels.eightbit_linear import gate_up8, linear8, linear8_parts
from server.kernels.eightbit_product import pack_groups
from server.kernels.eightbit_qkv import qkv_rope8
from server.kernels.eightbit_tiles import EightTile, Weight, weight8
from server.kernels.quantize import (
    Precision,
    Quantized,
    Sums,
    add_norm_quantize_,
    norm_quantize,
    quantize,
    silu_mul_quantize,
)
from server.kernels.rope import rope_write
from server.kernels.skinny_qkv import Heads
from server.kernels.skinny_tiles import MAX_TOKENS
from server.models.norm import RMSNorm
from server.quant.formats import LinearFormat, QuantizedWeight

_PART_BYTES, _PART_TOKENS = 256 << 20, 1024
"""The MLP of large prompt chunks is computed in parts, as in llama_kernels."""


class Low(Protocol):
    """A linear layer of the low-precision way: what it wants its input as, and its product."""

    @property
    def precision(self) -> Precision:
        """What rows of its input are quantised to."""

    @property
    def smooth(self) -> Tensor | None:
        """Factors [K] of its input's columns."""

    @property
    def out_features(self) -> int:
        """N."""

    @property
    def path(self) -> str:
        """Which kernel runs."""

    def parts(self, x: Quantized, dtype: torch.dtype, tile: EightTile | None, pdl: bool) -> Sums:
        """Its result for a residual stream of `dtype`."""

    def whole(self, x: Quantized, dtype: torch.dtype, tile: EightTile | None, pdl: bool) -> Tensor:
        """Its result [M, N] rounded to `dtype`."""

    def mixed(self, x: Quantized, dtype: torch.dtype, tile: EightTile | None, pdl: bool) -> Sums | Tensor:
        """Of gate and up: SiLU(gate) * up [M, N / 2] of `dtype`, or what silu_mul_quantize makes it of."""


def supported(format: LinearFormat) -> bool:
    """Whether these kernels compute the format: 8 bits a row, or 4 bits in groups with a scale a token."""
    if format.minimum or format.activations == "int8-group":
        return False
    if format.weights == "int4":
        return format.activations != "none" and format.group_size in (32, 64, 128)
    return format.group_size is None and format.activations in ("none", format.weights)


@dataclass(frozen=True, slots=True)
class LowLinear:
    """Implements Low for a stored weight; `path` names the kernel."""

    weight: Weight
    bias: Tensor | None
    precision: Precision
    smooth: Tensor | None
    path: str

    @classmethod
    def of(cls, stored: QuantizedWeight, bias: Tensor | None = None) -> LowLinear:
        """Repacks what has to be. Raises ValueError for a format that is not `supported`."""
        form = stored.format
        if not supported(form) or form.activations == "int8-group":
            raise ValueError(f"format {form.name} has no kernel here")
        if form.group_size is None:
            weight = weight8(stored.values, stored.scales)
        else:
            packed, scales = pack_groups(stored.numbers(), stored.scales, form.group_size, form.activations)
            weight = Weight(packed, scales, stored.shape[1], form.group_size)
        smooth = None if stored.input_scales is None else stored.input_scales.float()
        return cls(weight, bias, form.activations, smooth, f"triton-{form.name}")

    @property
    def in_features(self) -> int:
        """K."""
        return self.weight.columns

    @property
    def out_features(self) -> int:
        """N."""
        return self.weight.rows

    def __call__(self, x: Tensor) -> Tensor:
        """Maps x [N, K] to [N, O] in its dtype, by itself."""
        if len(x) == 0:
            return x.new_empty(0, self.out_features)
        return self.whole(quantize(x, self.precision, self.smooth), x.dtype, None, False)

    def parts(self, x: Quantized, dtype: torch.dtype, tile: EightTile | None, pdl: bool) -> Sums:
        """See Low."""
        if len(x.values) <= MAX_TOKENS:
            return linear8_parts(x, self.weight, self.bias, tile=tile, pdl=pdl)
        return large_parts(x, self.weight, dtype, self.bias)

    def whole(self, x: Quantized, dtype: torch.dtype, tile: EightTile | None, pdl: bool) -> Tensor:
        """See Low."""
        if len(x.values) <= MAX_TOKENS:
            return linear8(x, self.weight, dtype, self.bias, tile=tile, pdl=pdl)
        return total(large_parts(x, self.weight, dtype, self.bias), dtype)

    def mixed(self, x: Quantized, dtype: torch.dtype, tile: EightTile | None, pdl: bool) -> Sums | Tensor:
        """See Low."""
        if len(x.values) <= MAX_TOKENS:
            return gate_up8(x, self.weight, dtype, self.bias, tile=tile, pdl=pdl)
        return large_parts(x, self.weight, dtype, self.bias)


@dataclass(frozen=True, slots=True)
class DenseLinear:
    """Implements Low for a layer that stays in the model's dtype."""

    weight: Tensor
    bias: Tensor | None = None
    precision: Precision = "none"
    smooth: Tensor | None = None
    path: str = "torch"

    @property
    def out_features(self) -> int:
        """N."""
        return len(self.weight)

    def parts(self, x: Quantized, dtype: torch.dtype, tile: EightTile | None, pdl: bool) -> Sums:
        """See Low."""
        return Sums(F.linear(x.values, self.weight)[None], bias=self.bias)

    def whole(self, x: Quantized, dtype: torch.dtype, tile: EightTile | None, pdl: bool) -> Tensor:
        """See Low."""
        return F.linear(x.values, self.weight, self.bias)

    def mixed(self, x: Quantized, dtype: torch.dtype, tile: EightTile | None, pdl: bool) -> Sums | Tensor:
        """See Low."""
        return self.parts(x, dtype, tile, pdl)


@dataclass(frozen=True, slots=True)
class LowLayer:
    """A decoder layer; the fields of server.models.llama.Layer."""

    input_norm: RMSNorm
    qkv: Low
    q_norm: RMSNorm | None
    k_norm: RMSNorm | None
    out: Low
    post_norm: RMSNorm
    gate_up: Low
    down: Low
    window: int | None
    rotates: bool


@dataclass(frozen=True, slots=True)
class LowPlan:
    """Tiles of a step of up to 64 tokens; None: the first candidate."""

    qkv: EightTile | None = None
    out: EightTile | None = None
    gate_up: EightTile | None = None
    down: EightTile | None = None
    head: EightTile | None = None


Attend = Callable[[Tensor, Tensor, int | None], Tensor]
"""(q [N, heads, head_dim], pool, window) -> [N, heads * head_dim]."""


@dataclass(slots=True)
class LowStep:
    """What all layers of a step share."""

    positions: Tensor
    places: Tensor
    attend: Attend
    plan: LowPlan = field(default_factory=LowPlan)


class LowWay:
    """Runs layers. Everything can be captured in a CUDA graph after one call of the same shape."""

    def __init__(self, heads: Heads, rotations: Tensor, dtype: torch.dtype, *, pdl: bool) -> None:
        self.heads, self.rotations, self.dtype, self.pdl = heads, rotations, dtype, pdl

    def layers(
        self,
        x: Tensor,
        layers: Sequence[LowLayer],
        pools: Sequence[Tensor],
        step: LowStep,
        norm: RMSNorm,
        head: Low,
        features: Callable[[int, Tensor], None] | None = None,
    ) -> Quantized:
        """All layers on x [N, H] in place. Returns it as the network's last `norm` and the `head` want it.

        `features` sees x after each layer.
        """
        first = layers[0]
        ready = norm_quantize(
            x, first.input_norm.weight, first.input_norm.eps, first.qkv.precision, first.qkv.smooth, pdl=self.pdl
        )
        for i, (layer, pool) in enumerate(zip(layers, pools, strict=True)):
            following = layers[i + 1] if i + 1 < len(layers) else None
            after = (norm, head) if following is None else (following.input_norm, following.qkv)
            q = self.queries(layer, ready, pool, step)
            ready = self.rest(layer, x, step.attend(q, pool, layer.window), after, step.plan)
            if features is not None:
                features(i, x)
        return ready

    def queries(self, layer: LowLayer, ready: Quantized, pool: Tensor, step: LowStep) -> Tensor:
        """Rotated queries [N, heads, head_dim] of the layer's normed input; keys and values go to the pool."""
        h, num_tokens = self.heads, len(ready.values)
        if num_tokens <= MAX_TOKENS and isinstance(layer.qkv, LowLinear) and layer.q_norm is None:
            q = qkv_rope8(
                ready, layer.qkv.weight, layer.qkv.bias, pool, step.positions, step.places, self.rotations, h,
                self.dtype, rotate=layer.rotates, tile=step.plan.qkv, pdl=self.pdl, settled=self.pdl,
            )  # fmt: skip
            return q.view(num_tokens, h.num_heads, h.head_dim)
        qkv = layer.qkv.whole(ready, self.dtype, step.plan.qkv, self.pdl)
        rope_write(
            qkv, pool, step.positions, step.places, self.rotations, h.num_heads, h.num_kv_heads, h.head_dim,
            q_norm=None if layer.q_norm is None else layer.q_norm.weight,
            k_norm=None if layer.k_norm is None else layer.k_norm.weight,
            eps=0.0 if layer.q_norm is None else layer.q_norm.eps,
            rotate=layer.rotates,
        )  # fmt: skip
        return qkv.view(num_tokens, -1, h.head_dim)[:, : h.num_heads]

    def rest(self, layer: LowLayer, x: Tensor, mixed: Tensor, after: tuple[RMSNorm, Low], plan: LowPlan) -> Quantized:
        """What follows attention's result `mixed` [N, heads * head_dim] in a layer, on x [N, H] in place.

        Returns x as what comes `after` it, a norm and its linear layer, wants it.
        """
        inner = self._plain(mixed, layer.out)
        ready = self._added(x, layer.out.parts(inner, self.dtype, plan.out, self.pdl), layer.post_norm, layer.gate_up)
        part = max(1, _PART_BYTES // (layer.gate_up.out_features * x.element_size() * _PART_TOKENS)) * _PART_TOKENS
        if len(x) <= part:
            return self._added(x, self._mlp(layer, ready, plan), *after)
        found = [
            self._added(x[begin : begin + part], self._mlp(layer, _rows(ready, begin, part), plan), *after)
            for begin in range(0, len(x), part)
        ]
        scales = [rows.scales for rows in found if rows.scales is not None]
        values = torch.cat([rows.values.view(torch.uint8) for rows in found]).view(found[0].values.dtype)
        return Quantized(values, torch.cat(scales) if scales else None)

    def logits(
        self, x: Tensor, ready: Quantized, norm: RMSNorm, head: Low, logits_at: Tensor | None, plan: LowPlan
    ) -> Tensor:
        """[T, V] at tokens `logits_at` [T] (None: all) of x [N, H], which `layers` left and made `ready`."""
        if logits_at is not None:
            ready = norm_quantize(x, norm.weight, norm.eps, head.precision, head.smooth, rows=logits_at, pdl=self.pdl)
        return head.whole(ready, self.dtype, plan.head, self.pdl)

    def _mlp(self, layer: LowLayer, ready: Quantized, plan: LowPlan) -> Sums:
        down = layer.down
        hidden = layer.gate_up.mixed(ready, self.dtype, plan.gate_up, self.pdl)
        if isinstance(hidden, Sums):
            inner = silu_mul_quantize(hidden, down.precision, self.dtype, down.smooth, pdl=self.pdl)
        else:
            inner = self._plain(hidden, down)
        return down.parts(inner, self.dtype, plan.down, self.pdl)

    def _plain(self, x: Tensor, linear: Low) -> Quantized:
        if linear.precision == "none" and linear.smooth is None:
            return Quantized(x, None)
        return quantize(x, linear.precision, linear.smooth, pdl=self.pdl)

    def _added(self, x: Tensor, delta: Sums, norm: RMSNorm, linear: Low) -> Quantized:
        return add_norm_quantize_(x, delta, norm.weight, norm.eps, linear.precision, linear.smooth, pdl=self.pdl)


def _rows(x: Quantized, begin: int, count: int) -> Quantized:
    return Quantized(x.values[begin : begin + count], None if x.scales is None else x.scales[begin : begin + count])
