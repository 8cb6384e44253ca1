"""The network of an EAGLE-3 head: one decoder layer that reads a token and the target's features of the one before.

Li et al. 2025, "EAGLE-3: Scaling up Inference Acceleration of Large Language Models via Training-Time Test"
(arXiv 2503.01840), section 3. The features of three target layers are fused to the width of the residual stream; the
layer's attention sees [norm(embedding), norm(features)], twice as wide; its output, taken before the final norm, stands
for the features of a token that the target has not seen, and a head over a reduced vocabulary names the next one.

There is one layer, so its keys and values depend on the token and its features alone, never on attention: a token that
only has to be remembered costs one projection.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, TypeVar

import torch
from torch import Tensor

from draft_models.eagle3_config import Eagle3Config
from draft_models.eagle3_ops import Eagle3Ops, TorchOps
from draft_models.eagle3_weights import Eagle3Weights
from server.kernels.paged import PagedRows
from server.models.rope import interleave_rows, rotation_table
from server.quant.build import linear_of
from server.quant.dense import Linear
from server.quant.formats import QuantizedWeight, can_join, join
from server.quant.layer import LinearLayer

if TYPE_CHECKING:
    from draft_models.eagle1 import Eagle1Weights

W = TypeVar("W", Tensor, QuantizedWeight)


class Eagle3Network:
    """The head's forward pass. `embedding` [V, H] is the target's own tensor or the head's; `max_positions` bounds
    positions.

    The linears come from `server.quant`, as the target's do. What lies between them is `ops`, whose kernels read norms
    and the embedding as plain tensors in the network's dtype.
    """

    def __init__(
        self,
        config: Eagle3Config,
        weights: Eagle3Weights,
        embedding: Tensor,
        max_positions: int,
        ops: Eagle3Ops | None = None,
    ) -> None:
        self._set_up(config, weights, embedding, max_positions, ops)
        own = self._own
        self._fc = self._linear(weights, ["fc"], None if weights.fc_bias is None else own(weights.fc_bias))
        self._input_norm, self._hidden_norm = own(weights.input_layernorm), own(weights.hidden_norm)
        self._norm, self._head = own(weights.norm), self._linear(weights, ["lm_head"])

    def _set_up(
        self,
        config: Eagle3Config,
        w: Eagle3Weights | Eagle1Weights,
        embedding: Tensor,
        max_positions: int,
        ops: Eagle3Ops | None,
    ) -> None:
        """What heads of all versions have: the embedding and, of the layer, all but its ends."""
        c = config
        if tuple(embedding.shape) != (c.vocab_size, c.hidden_size):
            found = tuple(embedding.shape)
            raise ValueError(f"embedding: {found} is not valid; the head needs {(c.vocab_size, c.hidden_size)}")
        self.config, self.embedding, self.ops = config, embedding, ops or TorchOps()
        self.device, self.dtype = embedding.device, embedding.dtype
        self._qkv = self._linear(w, ["q_proj", "k_proj", "v_proj"])
        self._out, self._down = self._linear(w, ["o_proj"]), self._linear(w, ["down_proj"])
        self._gate_up = self._linear(w, ["gate_proj", "up_proj"])
        self._post_norm = self._own(w.post_attention_layernorm)
        self.target_ids = w.target_ids.to(self.device)
        table = rotation_table(c.rope, c.head_dim, max_positions, self.device)
        self._rotations = torch.view_as_real(table).contiguous()

    def _own(self, weight: Tensor) -> Tensor:
        return weight.to(self.device, self.dtype)

    def _linear(self, w: Eagle3Weights | Eagle1Weights, fields: list[str], bias: Tensor | None = None) -> LinearLayer:
        """One layer of the outputs of all `fields`; in low precision where all of them are, in one format."""
        stored: Mapping[str, QuantizedWeight] = getattr(w, "quantised", {})
        parts = [stored[name] for name in fields if name in stored]
        if len(parts) == len(fields) and can_join(parts):
            return linear_of(
                join([self._turned(name, part).to(self.device) for name, part in zip(fields, parts, strict=True)]),
                bias,
                dtype=self.dtype,
            )
        return Linear(self._own(torch.cat([self._turned(name, getattr(w, name)) for name in fields])), bias)

    def _turned(self, name: str, weight: W) -> W:
        """Queries' and keys' rotary pairs side by side."""
        if name not in ("q_proj", "k_proj"):
            return weight
        dim = self.config.head_dim
        if isinstance(weight, Tensor):
            return interleave_rows(weight, dim)
        return weight.rows(interleave_rows(torch.arange(weight.shape[0], device=weight.device), dim))

    def fuse(self, features: Tensor) -> Tensor:
        """The target's features [N, F] -> [N, H]."""
        return self._fc(features)

    def remember(
        self, token_ids: Tensor, features: Tensor, positions: Tensor, places: Tensor, pool: Tensor
    ) -> tuple[Tensor, Tensor]:
        """Writes the keys and values of N tokens -> (queries [N, heads, D], residual stream [N, H]).

        `features` [N, H] are fused ones or the layer's own output, of the token before each; it is left as it is.
        """
        c = self.config
        x, residual = self._enter(token_ids, features)
        qkv = self._qkv(x)
        self.ops.rope_write(qkv, pool, positions, places, self._rotations, c.num_heads)
        queries = qkv[:, : c.num_heads * c.head_dim].unflatten(-1, (c.num_heads, c.head_dim))
        return queries, residual

    def _enter(self, token_ids: Tensor, features: Tensor) -> tuple[Tensor, Tensor]:
        """-> (what attention's projections read [N, 2 H], residual stream [N, H])."""
        c = self.config
        both = self.ops.embed_norm(
            token_ids, self.embedding, self._input_norm, features, self._hidden_norm, c.rms_norm_eps
        )
        return both, both[:, c.hidden_size :] if c.norm_before_residual else features

    def attend(
        self, queries: Tensor, residual: Tensor, pool: Tensor, rows: PagedRows, first: Tensor
    ) -> tuple[Tensor, Tensor]:
        """The rest of the layer for one token a row -> (its output [R, H], logits [R, C] over the draft vocabulary).

        `queries` [R, heads, D] and `residual` [R, H] (overwritten) are those of `remember`; `first` [R] int64 is the
        first position a row should see.
        """
        eps = self.config.rms_norm_eps
        mixed = self.ops.attention(queries, pool, rows, first)
        normed = self.ops.add_rms_norm_(residual, self._out(mixed), self._post_norm, eps)
        gated: Callable[[Tensor], Tensor] | None = getattr(self._gate_up, "gated", None)  # of kernels in low precision
        inner = self.ops.silu_mul(self._gate_up(normed)) if gated is None else gated(normed)
        return residual, self._leave(residual, self._down(inner))

    def _leave(self, residual: Tensor, delta: Tensor) -> Tensor:
        """Adds `delta` to the residual stream [R, H] in place -> logits [R, C]."""
        return self._head(self.ops.add_rms_norm_(residual, delta, self._norm, self.config.rms_norm_eps))
