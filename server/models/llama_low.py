"""The Llama family's forward pass on a GPU where linear layers are quantised: llama_kernels_8bit.py's way, whole.

Few tokens and many take the same launches; each linear layer changes its kernel with their number (`server.quant.low`).
Deterministic mode: the same with one tile for all rows, and attention and plain layers as llama_kernels.py has them.
"""

from __future__ import annotations

import torch
from torch import Tensor

from server.kernels.embedding import embed
from server.kernels.paged import PagedRows
from server.kernels.runtime import supports_pdl
from server.kernels.skinny_qkv import Heads
from server.models.kernel_attention import KernelAttention
from server.models.llama import Layer, LlamaModel
from server.models.llama_kernels import TIERS
from server.models.llama_kernels_8bit import LowLayer, LowPlan, LowStep, LowWay
from server.quant.dense import Linear
from server.quant.low_any import low_of


def is_quantised(model: LlamaModel) -> bool:
    """Whether any linear layer is not plain."""
    return not all(isinstance(layer, Linear) for layer in model.linears().values())


class LlamaLowKernels:
    """Implements server.models.paged_forward.PagedForward for a LlamaModel on a GPU, whose weights it shares.

    Everything can be captured in a CUDA graph after one call of the same shape. Raises ValueError for a layer of which
    deterministic mode has no kernel.
    """

    def __init__(self, model: LlamaModel, *, deterministic: bool = False, pdl: bool | None = None) -> None:
        c = model.config
        self.model = model
        self.deterministic = deterministic
        self.pdl = supports_pdl(model.device) if pdl is None else pdl
        self.heads = Heads(c.num_heads, c.num_kv_heads, c.head_dim)
        self.attention = KernelAttention(
            c.num_heads, c.num_kv_heads, c.head_dim, deterministic=deterministic, pdl=self.pdl
        )
        self.layers = [_low_layer(layer, deterministic) for layer in model.layers]
        self.head = low_of(model.head, exact=deterministic)
        self.way = LowWay(self.heads, torch.view_as_real(model.rotations), model.dtype, pdl=self.pdl)
        self.plans: dict[int, LowPlan] = {} if deterministic else dict.fromkeys(TIERS, LowPlan())

    def plan(self, num_tokens: int) -> LowPlan:
        """The plan of a step of `num_tokens`: that of the smallest tier that holds it."""
        tiers = [t for t in self.plans if t >= num_tokens]
        return self.plans[min(tiers)] if tiers else LowPlan()

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
        num_tokens, model = token_ids.shape[0], self.model
        fits = rows.width > 0 and rows.num_rows * rows.width == num_tokens
        # What attention does not write must be finite: padding's keys and values go to block 0.
        make = torch.empty if fits else torch.zeros
        mixed = make(num_tokens, self.heads.num_heads * self.heads.head_dim, dtype=model.dtype, device=token_ids.device)

        def attend(q: Tensor, pool: Tensor, window: int | None) -> Tensor:
            self.attention(q, pool, rows, mixed, window=window)
            return mixed  # with the rows of padding, which attention leaves alone

        features: list[Tensor] = []

        def after(index: int, x: Tensor) -> None:
            if index in feature_layers:
                features.append(x.clone())

        step = LowStep(positions, places, attend, self.plan(num_tokens))
        x = embed(token_ids, model.embedding)
        ready = self.way.layers(x, self.layers, pools, step, model.norm, self.head, after)
        logits = self.way.logits(x, ready, model.norm, self.head, logits_at, step.plan)
        return logits, torch.cat(features, dim=-1) if features else None

    forward = __call__


def _low_layer(layer: Layer, exact: bool) -> LowLayer:
    return LowLayer(
        layer.input_norm,
        low_of(layer.qkv, exact=exact),
        layer.q_norm,
        layer.k_norm,
        low_of(layer.out, exact=exact),
        layer.post_norm,
        low_of(layer.gate_up, exact=exact),
        low_of(layer.down, exact=exact),
        layer.window,
        layer.rotates,
    )
