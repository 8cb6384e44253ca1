"""The network of an EAGLE-3 head: one decoder layer that reads a token and the target's features of the one before.

Li et al. 2025, "EAGLE-3: Scaling up Inference Acceleration of Large Language Models via Training-Time Test"
(arXiv 2503.01840), section 3. The features of three target layers are fused to the width of the residual stream; the
layer's attention sees [norm(embedding), norm(features)], twice as wide; its output, taken before the final norm, stands
for the features of a token that the target has not seen, and a head over a reduced vocabulary names the next one.

There is one layer, so its keys and values depend on the token and its features alone, never on attention: a token that
only has to be remembered costs one projection.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from draft_models.eagle3_config import Eagle3Config
from draft_models.eagle3_ops import Eagle3Ops, TorchOps
from draft_models.eagle3_weights import Eagle3Weights
from server.kernels.paged import PagedRows
from server.models.rope import interleave_rows, rotation_table


class Eagle3Network:
    """The head's forward pass. `embedding` [V, H] is the target's own tensor; `max_positions` bounds positions."""

    def __init__(
        self,
        config: Eagle3Config,
        weights: Eagle3Weights,
        embedding: Tensor,
        max_positions: int,
        ops: Eagle3Ops | None = None,
    ) -> None:
        c, w = config, weights
        if tuple(embedding.shape) != (c.vocab_size, c.hidden_size):
            found = tuple(embedding.shape)
            raise ValueError(f"embedding: {found} is not valid; the head needs {(c.vocab_size, c.hidden_size)}")
        self.config, self.embedding, self.ops = config, embedding, ops or TorchOps()
        self.device, self.dtype = embedding.device, embedding.dtype

        def own(weight: Tensor) -> Tensor:
            return weight.to(self.device, self.dtype)

        self._fc, self._out, self._down = own(w.fc), own(w.o_proj), own(w.down_proj)
        self._input_norm, self._hidden_norm = own(w.input_layernorm), own(w.hidden_norm)
        self._post_norm, self._norm = own(w.post_attention_layernorm), own(w.norm)
        turned = [interleave_rows(w.q_proj, c.head_dim), interleave_rows(w.k_proj, c.head_dim)]
        self._qkv = own(torch.cat([*turned, w.v_proj]))
        self._gate_up = own(torch.cat([w.gate_proj, w.up_proj]))
        self._head = own(w.lm_head)
        self.target_ids = w.target_ids.to(self.device)
        table = rotation_table(c.rope, c.head_dim, max_positions, self.device)
        self._rotations = torch.view_as_real(table).contiguous()

    def fuse(self, features: Tensor) -> Tensor:
        """The target's features [N, 3 H] -> [N, H]."""
        return F.linear(features, self._fc)

    def remember(
        self, token_ids: Tensor, features: Tensor, positions: Tensor, places: Tensor, pool: Tensor
    ) -> tuple[Tensor, Tensor]:
        """Writes the keys and values of N tokens -> (queries [N, heads, D], residual stream [N, H]).

        `features` [N, H] are fused ones or the layer's own output, of the token before each; it is left as it is.
        """
        c = self.config
        both = self.ops.embed_norm(
            token_ids, self.embedding, self._input_norm, features, self._hidden_norm, c.rms_norm_eps
        )
        qkv = F.linear(both, self._qkv)
        self.ops.rope_write(qkv, pool, positions, places, self._rotations, c.num_heads)
        queries = qkv[:, : c.num_heads * c.head_dim].unflatten(-1, (c.num_heads, c.head_dim))
        return queries, both[:, c.hidden_size :] if c.norm_before_residual else features

    def attend(
        self, queries: Tensor, residual: Tensor, pool: Tensor, rows: PagedRows, first: Tensor
    ) -> tuple[Tensor, Tensor]:
        """The rest of the layer for one token a row -> (its output [R, H], logits [R, C] over the draft vocabulary).

        `queries` [R, heads, D] and `residual` [R, H] (overwritten) are those of `remember`; `first` [R] int64 is the
        first position a row should see.
        """
        eps = self.config.rms_norm_eps
        mixed = self.ops.attention(queries, pool, rows, first)
        normed = self.ops.add_rms_norm_(residual, F.linear(mixed, self._out), self._post_norm, eps)
        inner = self.ops.silu_mul(F.linear(normed, self._gate_up))
        normed = self.ops.add_rms_norm_(residual, F.linear(inner, self._down), self._norm, eps)
        return residual, F.linear(normed, self._head)
