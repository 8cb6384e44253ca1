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

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from server.kernels.quantize import Quantized, Sums, add_norm_quantize_, norm_quantize, quantize, silu_mul_quantize
from server.kernels.rope import rope_write
from server.kernels.skinny_qkv import Heads
from server.models.norm import RMSNorm
from server.quant.low import Choice, Low, Target, rows_of

_PART_BYTES, _PART_TOKENS = 256 << 20, 1024
"""The MLP of large prompt chunks is computed in parts, as in llama_kernels."""


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


Role = str
"""Which linear layer of a decoder: a field of LowLayer, or `head`."""


@dataclass(frozen=True, slots=True)
class LowPlan:
    """How steps of up to 64 tokens compute each product: by role and what `kernel_key` says of the layer.

    What is not in it is computed by the first candidate.
    """

    choices: Mapping[tuple[Role, str], Choice] = field(default_factory=dict)

    def of(self, role: Role, low: Low) -> Choice | None:
        """How `low` is computed in that role."""
        return self.choices.get((role, kernel_key(low))) if self.choices else None


def kernel_key(low: Low) -> str:
    """Layers of one key are computed alike: their kernel and their shape."""
    return f"{low.path}:{low.out_features}x{low.in_features}"


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
        h, num_tokens, tile = self.heads, len(ready.values), step.plan.of("qkv", layer.qkv)
        if layer.q_norm is None:
            target = Target(pool, step.positions, step.places, self.rotations, h, self.dtype, layer.rotates)
            q = layer.qkv.queries(ready, target, tile, self.pdl)
            if q is not None:
                return q.view(num_tokens, h.num_heads, h.head_dim)
        qkv = layer.qkv.whole(ready, self.dtype, tile, self.pdl)
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
        ready = self._added(
            x, layer.out.parts(inner, self.dtype, plan.of("out", layer.out), self.pdl), layer.post_norm, layer.gate_up
        )
        part = max(1, _PART_BYTES // (layer.gate_up.out_features * x.element_size() * _PART_TOKENS)) * _PART_TOKENS
        if len(x) <= part:
            return self._added(x, self._mlp(layer, ready, plan), *after)
        found = [
            self._added(x[begin : begin + part], self._mlp(layer, rows_of(ready, begin, part), plan), *after)
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
        return head.whole(ready, self.dtype, plan.of("head", head), self.pdl)

    def _mlp(self, layer: LowLayer, ready: Quantized, plan: LowPlan) -> Sums:
        down = layer.down
        hidden = layer.gate_up.mixed(ready, self.dtype, plan.of("gate_up", layer.gate_up), self.pdl)
        if isinstance(hidden, Sums):
            inner = silu_mul_quantize(hidden, down.precision, self.dtype, down.smooth, pdl=self.pdl)
        else:
            inner = self._plain(hidden, down)
        return down.parts(inner, self.dtype, plan.of("down", down), self.pdl)

    def _plain(self, x: Tensor, linear: Low) -> Quantized:
        if linear.precision == "none" and linear.smooth is None:
            return Quantized(x, None)
        return quantize(x, linear.precision, linear.smooth, pdl=self.pdl)

    def _added(self, x: Tensor, delta: Sums, norm: RMSNorm, linear: Low) -> Quantized:
        return add_norm_quantize_(x, delta, norm.weight, norm.eps, linear.precision, linear.smooth, pdl=self.pdl)
