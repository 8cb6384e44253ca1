"""The Llama family's forward pass on a GPU, by kernels.

Two ways through a layer, chosen by the number of tokens. Fused, for up to 64 tokens: five launches,

    norm + qkv + rotary + write to the pool | attention | out + residual | norm + gate, up + SiLU | down + residual

each overlapping the end of the one before; who writes the residual stream prepares the next norm. Else cuBLAS with
small kernels between: norms (with the residual's sum), rotary embedding, SiLU. Deterministic mode takes the second way
with a matrix product whose rows do not depend on how many there are. Networks with quantised layers: llama_low.py.
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import Enum

import torch
import torch.nn.functional as F
from torch import Tensor

from server.kernels.activation import silu_mul
from server.kernels.embedding import embed, embed_scaled
from server.kernels.invariant import linear as invariant_linear
from server.kernels.norm import add_rms_norm_, rms_norm
from server.kernels.paged import PagedRows
from server.kernels.rope import rope_write
from server.kernels.runtime import supports_pdl
from server.kernels.skinny import linear_residual_scaled_, norm_linear
from server.kernels.skinny_mlp import norm_gate_up
from server.kernels.skinny_qkv import Heads, norm_qkv_rope
from server.kernels.skinny_scaled import Scaled
from server.kernels.skinny_tiles import MAX_TOKENS, Kind, TileConfig, block_m, configs_for
from server.models.kernel_attention import KernelAttention
from server.models.llama import Layer, LlamaModel
from server.models.norm import RMSNorm
from server.quant.dense import as_dense
from server.quant.layer import LinearLayer

TIERS = (4, 8, 16, 32, 64)
"""Steps of up to so many tokens have a plan of their own."""
_PART_BYTES, _PART_TOKENS = 256 << 20, 1024
"""Feed-forward activations of large prompt chunks are made in parts of up to so many bytes and a multiple of so many
tokens: 4,096 tokens on the 8B shape, which take a quarter of the memory of 16,384."""


class Path(Enum):
    """How the linear layers of a step are computed."""

    FUSED = "fused"
    CUBLAS = "cublas"


@dataclass(frozen=True, slots=True)
class Plan:
    """How a step computes its layers and its head; tiles (None: the first candidate) matter on the fused path only."""

    path: Path = Path.FUSED
    head_path: Path = Path.FUSED
    qkv: TileConfig | None = None
    out: TileConfig | None = None
    gate_up: TileConfig | None = None
    down: TileConfig | None = None
    head: TileConfig | None = None


@dataclass(slots=True)
class _Step:
    """What all layers of a step share; `mixed` [N, heads * head_dim] is where attention leaves its result."""

    rows: PagedRows
    positions: Tensor
    places: Tensor
    mixed: Tensor
    plan: Plan


class LlamaKernels:
    """Implements server.models.paged_forward.PagedForward for a LlamaModel, whose weights it shares.

    Everything can be captured in a CUDA graph after one call of the same shape. Raises ValueError for weights that
    are quantised or packed for another device.
    """

    def __init__(self, model: LlamaModel, *, deterministic: bool = False, pdl: bool | None = None) -> None:
        if model.linear_path != "torch" or model.head.path != "torch":
            paths = f"{model.linear_path!r} and {model.head.path!r}"
            raise ValueError(f"linear layers are {paths}: these kernels need plain ones, not packed")
        c = model.config
        self.model = model
        self.deterministic = deterministic
        self.pdl = supports_pdl(model.device) if pdl is None else pdl
        self.heads = Heads(c.num_heads, c.num_kv_heads, c.head_dim)
        self.rotations = torch.view_as_real(model.rotations)
        self.attention = KernelAttention(
            c.num_heads, c.num_kv_heads, c.head_dim, deterministic=deterministic, pdl=self.pdl
        )
        self.plans = {} if deterministic else dict.fromkeys(TIERS, Plan())

    def plan(self, num_tokens: int) -> Plan:
        """The plan of a step of `num_tokens`: that of the smallest tier that holds it, else cuBLAS."""
        tiers = [t for t in self.plans if t >= num_tokens]
        return self.plans[min(tiers)] if tiers else Plan(Path.CUBLAS)

    def __call__(
        self,
        token_ids: Tensor,
        pools: list[Tensor],
        rows: PagedRows,
        positions: Tensor,
        places: Tensor,
        logits_at: Tensor | None,
        feature_layers: tuple[int, ...] = (),
    ) -> tuple[Tensor, Tensor | None]:
        """See PagedForward. Features are [N, H * len(feature_layers)], the layers in ascending order."""
        num_tokens = token_ids.shape[0]
        fits = rows.width > 0 and rows.num_rows * rows.width == num_tokens
        # What attention does not write must be finite: padding's keys and values go to block 0.
        make = torch.empty if fits else torch.zeros
        mixed = make(
            num_tokens, self.heads.num_heads * self.heads.head_dim, dtype=self.model.dtype, device=token_ids.device
        )
        step = _Step(rows, positions, places, mixed, self.plan(num_tokens))
        features: list[Tensor] = []
        if step.plan.path is Path.FUSED:
            x, scaled = embed_scaled(token_ids, self.model.embedding, self.model.layers[0].input_norm.weight)
            self._fused(x, scaled, pools, step, feature_layers, features)
            ready: Scaled | Tensor = scaled
        else:
            x = embed(token_ids, self.model.embedding)
            ready = self._by_cublas(x, pools, step, feature_layers, features)
        logits = self.logits(x, ready, logits_at, step.plan)
        return logits, torch.cat(features, dim=-1) if features else None

    forward = __call__

    def _fused(
        self,
        x: Tensor,
        scaled: Scaled,
        pools: list[Tensor],
        step: _Step,
        feature_layers: tuple[int, ...],
        features: list[Tensor],
    ) -> None:
        """All layers on x [N, H], in place; `scaled` has x prepared for the first norm, then for the last."""
        layers = self.model.layers
        after = [layer.input_norm for layer in layers[1:]] + [self.model.norm]
        for i, (layer, pool, norm) in enumerate(zip(layers, pools, after, strict=True)):
            q = self.fused_queries(layer, scaled, pool, step.positions, step.places, step.plan)
            mixed = self.attention(q, pool, step.rows, step.mixed, window=layer.window)
            self.fused_rest(layer, x, scaled, mixed, norm, step.plan)
            if i in feature_layers:
                features.append(x.clone())

    def fused_queries(
        self, layer: Layer, scaled: Scaled, pool: Tensor, positions: Tensor, places: Tensor, plan: Plan
    ) -> Tensor:
        """Rotated queries [N, heads, head_dim] of x [N, H] prepared for the layer's norm; writes keys and values."""
        h, eps, qkv, values = self.heads, layer.input_norm.eps, as_dense(layer.qkv), scaled.values
        if layer.q_norm is None:
            q = norm_qkv_rope(
                scaled, eps, qkv.weight, qkv.bias, pool, positions, places, self.rotations, h,
                rotate=layer.rotates, config=plan.qkv, pdl=self.pdl, settled=self.pdl,
            )  # fmt: skip
            return q.view(len(values), h.num_heads, h.head_dim)
        config = plan.qkv or configs_for(Kind.QKV, len(values), h.columns, values.shape[1], values.element_size())[0]
        both = norm_linear(scaled, eps, qkv.weight, qkv.bias, config=config, pdl=self.pdl)
        return self._rotated(layer, both, pool, positions, places)

    def fused_rest(self, layer: Layer, x: Tensor, scaled: Scaled, mixed: Tensor, norm: RMSNorm, plan: Plan) -> None:
        """What follows attention's result `mixed` [N, heads * head_dim] in a layer, on x [N, H] in place.

        Leaves x prepared for `norm`, the next layer's, in `scaled`.
        """
        post, up, out, down = layer.post_norm, as_dense(layer.gate_up), as_dense(layer.out), as_dense(layer.down)
        linear_residual_scaled_(x, mixed, out.weight, out.bias, post.weight, scaled, config=plan.out, pdl=self.pdl)
        hidden = norm_gate_up(scaled, post.eps, up.weight, up.bias, config=plan.gate_up, pdl=self.pdl)
        linear_residual_scaled_(x, hidden, down.weight, down.bias, norm.weight, scaled, config=plan.down, pdl=self.pdl)

    def _by_cublas(
        self, x: Tensor, pools: list[Tensor], step: _Step, feature_layers: tuple[int, ...], features: list[Tensor]
    ) -> Tensor:
        """All layers on x [N, H], in place -> its final norm [N, H]."""
        layers = self.model.layers
        after = [layer.input_norm for layer in layers[1:]] + [self.model.norm]
        normed = rms_norm(x, layers[0].input_norm.weight, layers[0].input_norm.eps)
        for i, (layer, pool, norm) in enumerate(zip(layers, pools, after, strict=True)):
            q = self.plain_queries(layer, normed, pool, step.positions, step.places)
            mixed = self.attention(q, pool, step.rows, step.mixed, window=layer.window)
            normed = self.plain_rest(layer, x, mixed, norm)
            if i in feature_layers:
                features.append(x.clone())
        return normed

    def plain_queries(self, layer: Layer, normed: Tensor, pool: Tensor, positions: Tensor, places: Tensor) -> Tensor:
        """Rotated queries [N, heads, head_dim] of the layer's normed input; keys and values go to the pool."""
        return self._rotated(layer, self._linear(normed, layer.qkv), pool, positions, places)

    def plain_rest(self, layer: Layer, x: Tensor, mixed: Tensor, norm: RMSNorm) -> Tensor:
        """What follows attention's result in a layer; x [N, H] in place. Returns `norm`, the next layer's, of it."""
        normed = self._residual_normed(x, mixed, layer.out, layer.post_norm)
        up, down = layer.gate_up, layer.down
        part = max(1, _PART_BYTES // (up.out_features * x.element_size() * _PART_TOKENS)) * _PART_TOKENS
        if len(x) <= part or self.deterministic:
            return self._residual_normed(x, silu_mul(self._linear(normed, up)), down, norm)
        for begin in range(0, len(x), part):
            rows = normed[begin : begin + part]
            inner = silu_mul(self._linear(rows, up))
            self._residual_normed(x[begin : begin + part], inner, down, norm, out=rows)
        return normed

    def _residual_normed(
        self, x: Tensor, inner: Tensor, linear: LinearLayer, norm: RMSNorm, out: Tensor | None = None
    ) -> Tensor:
        """Adds linear(inner) to x [N, H] in place; `norm` of the sum, in `out` if it is given.

        The product itself adds to x: with the sum in the norm, large steps move 4 units of N * H there instead of 2.
        """
        if self.deterministic:
            normed = add_rms_norm_(x, self._linear(inner, linear), norm.weight, norm.eps)
            return normed if out is None else out.copy_(normed)
        dense = as_dense(linear)
        x.addmm_(inner, dense.weight.t())
        if dense.bias is not None:
            x.add_(dense.bias)
        return rms_norm(x, norm.weight, norm.eps, out)

    def _rotated(self, layer: Layer, qkv: Tensor, pool: Tensor, positions: Tensor, places: Tensor) -> Tensor:
        """Queries [N, heads, head_dim] of qkv, normed and rotated; keys and values go to the pool."""
        h, q_norm, k_norm = self.heads, layer.q_norm, layer.k_norm
        rope_write(
            qkv, pool, positions, places, self.rotations, h.num_heads, h.num_kv_heads, h.head_dim,
            q_norm=None if q_norm is None else q_norm.weight,
            k_norm=None if k_norm is None else k_norm.weight,
            eps=0.0 if q_norm is None else q_norm.eps,
            rotate=layer.rotates,
        )  # fmt: skip
        return qkv.view(len(qkv), -1, h.head_dim)[:, : h.num_heads]

    def _linear(self, x: Tensor, linear: LinearLayer) -> Tensor:
        dense = as_dense(linear)
        run = invariant_linear if self.deterministic else F.linear
        return run(x, dense.weight, dense.bias)

    def logits(self, x: Tensor, ready: Scaled | Tensor, logits_at: Tensor | None, plan: Plan) -> Tensor:
        """[T, V] at tokens `logits_at` [T] (None: all) of x [N, H]; `ready`: x prepared for the last norm or normed."""
        norm, head = self.model.norm, self.model.head
        num_rows = len(x) if logits_at is None else len(logits_at)
        if isinstance(ready, Scaled) and plan.head_path is Path.FUSED and 1 <= num_rows <= MAX_TOKENS:
            config = plan.head if block_m(num_rows) == block_m(len(x)) else None
            plain = as_dense(head)
            return norm_linear(
                ready, norm.eps, plain.weight, plain.bias,
                rows=logits_at, config=config, pdl=self.pdl, settled=self.pdl,
            )  # fmt: skip
        normed = rms_norm(x, norm.weight, norm.eps) if isinstance(ready, Scaled) else ready
        return self._linear(normed if logits_at is None else normed[logits_at], head)
