"""The network of an EAGLE-3 head (see eagle3_network) for the CPU: packed linears, a row sees exactly its tokens."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from torch import Tensor

from draft_models.eagle3_config import Eagle3Config
from draft_models.eagle3_weights import Eagle3Weights
from server.models.norm import RMSNorm
from server.models.rope import interleave_rows, rotate_, rotation_table
from server.quant.build import linear_of
from server.quant.cpu.draft_layer import DraftLayer, fits
from server.quant.cpu.linear import CpuLinear, round_to_int8, rounding_pays
from server.quant.dense import MIN_PACKED_ROWS, Linear
from server.quant.dense_bf16 import Bf16Linear, bf16_pays
from server.quant.formats import stacked
from server.quant.layer import LinearLayer

if TYPE_CHECKING:
    from draft_models.eagle1 import Eagle1Weights

AnyLinear = LinearLayer | Bf16Linear


class Eagle3CpuNetwork:
    """The head's forward pass. `embedding` [V, H] is the target's own tensor or the head's; `max_positions` bounds
    positions.

    `fast`: a float32 target's head computes in bfloat16 where that is quicker; drafts are those of a head served in
    bfloat16. Steps of fewer than `min_rows` tokens are padded to it by the caller (see server/quant/dense.py).
    """

    layer: DraftLayer | None = None
    """`project`, attention and `finish` in two compiled calls, where its products are in 8 bits."""

    def __init__(
        self, config: Eagle3Config, weights: Eagle3Weights, embedding: Tensor, max_positions: int, fast: bool = False
    ) -> None:
        w = weights
        self._set_up(config, w, embedding, max_positions, fast)
        self._fc = self._linear(w.fc, bias=w.fc_bias)
        self._input_norm, self._hidden_norm = self._rms_norm(w.input_layernorm), self._rms_norm(w.hidden_norm)
        self._norm = self._rms_norm(w.norm)
        self._use_output(self._linear(w.lm_head))
        self.layer = self._compiled()

    def _compiled(self) -> DraftLayer | None:
        c = self.config
        linears = (self._qkv, self._out, self._gate_up, self._down, self._head)
        if c.norm_before_residual or not fits(linears, c.hidden_size, c.head_dim):
            return None
        norms = (self._input_norm, self._hidden_norm, self._post_norm, self._norm)
        return DraftLayer(
            self.embedding,
            [norm.weight for norm in norms],
            c.rms_norm_eps,
            [linear for linear in linears if isinstance(linear, CpuLinear)],
            (c.num_heads, c.num_kv_heads, c.head_dim),
            self._rotations,
        )

    def _set_up(
        self,
        config: Eagle3Config,
        w: Eagle3Weights | Eagle1Weights,
        embedding: Tensor,
        max_positions: int,
        fast: bool,
    ) -> None:
        """What heads of all versions have: the embedding and, of the layer, all but its ends."""
        c, linear = config, self._linear
        self.config, self.embedding = config, embedding
        self.device, self.dtype = embedding.device, embedding.dtype
        self._eight_bits = fast and self.dtype == torch.float32 and self.device.type in ("cpu", "meta")
        self._rounded = fast and self.dtype == torch.float32 and bf16_pays()
        self._qkv = linear(interleave_rows(w.q_proj, c.head_dim), interleave_rows(w.k_proj, c.head_dim), w.v_proj)
        self._out, self._down = linear(w.o_proj), linear(w.down_proj)
        self._gate_up = linear(w.gate_proj, w.up_proj)
        self._post_norm = self._rms_norm(w.post_attention_layernorm)
        self._rotations = rotation_table(c.rope, c.head_dim, max_positions, self.device)
        self.target_ids = w.target_ids

    def _linear(self, *parts: Tensor, bias: Tensor | None = None) -> AnyLinear:
        weight = stacked([part.to(self.dtype) for part in parts])
        if self._eight_bits and rounding_pays(weight.shape[1]):
            return linear_of(round_to_int8(weight), bias, dtype=self.dtype)
        if bias is None:
            return Bf16Linear(weight) if self._rounded else Linear(weight)
        return Linear(weight, bias.to(self.dtype))

    def _use_output(self, head: AnyLinear) -> None:
        self._head, self.linear_path = head, head.path
        self.min_rows = MIN_PACKED_ROWS if self.linear_path == "onednn-packed" else 1

    def _rms_norm(self, weight: Tensor) -> RMSNorm:
        return RMSNorm(weight.to(self.dtype), self.config.rms_norm_eps)

    def fuse(self, features: Tensor) -> Tensor:
        """The target's features [N, F] -> [N, H]."""
        return self._fc(features)

    def project(self, token_ids: Tensor, x: Tensor, positions: Tensor) -> tuple[Tensor, Tensor]:
        """Of N tokens: (queries, keys and values [N, heads + 2 kv_heads, D], turned; residual stream [N, H]).

        `x` [N, H] is what the token before each hands over: fused features, or the layer's own output.
        """
        c = self.config
        inputs, residual = self._enter(F.embedding(token_ids, self.embedding), x)
        qkv = self._qkv(inputs)
        by_head = qkv.view(x.shape[0], c.num_heads + 2 * c.num_kv_heads, c.head_dim)
        rotate_(by_head[:, : c.num_heads + c.num_kv_heads], self._rotations[positions].unsqueeze(1))
        return by_head, residual

    def _enter(self, embedded: Tensor, x: Tensor) -> tuple[Tensor, Tensor]:
        """-> (what attention's projections read [N, 2 H], residual stream [N, H])."""
        normed = self._hidden_norm(x)
        both = torch.cat([self._input_norm(embedded), normed], dim=-1)
        return both, normed if self.config.norm_before_residual else x

    def finish(self, mixed: Tensor, residual: Tensor) -> tuple[Tensor, Tensor]:
        """The rest of the layer: attention's result [M, heads * D] -> (its output [M, H], logits [M, C])."""
        x = self._out(mixed).add_(residual)
        gate, up = self._gate_up(self._post_norm(x)).chunk(2, dim=-1)
        x = self._down(F.silu(gate).mul_(up)).add_(x)
        return x, self._logits(x)

    def _logits(self, x: Tensor) -> Tensor:
        return self._head(self._norm(x))


class Context:
    """The keys and values that one row's chain sees: `kv` [L, 2 kv_heads, D], of which `length` are there."""

    __slots__ = ("_keys", "_kv", "_values", "length")

    def __init__(self, kv: Tensor, length: int) -> None:
        keys, values = kv.transpose(0, 1).unsqueeze(0).chunk(2, dim=1)
        self._kv, self._keys, self._values, self.length = kv, keys, values, length

    def append(self, kv: Tensor) -> None:
        """One more token's, [2 kv_heads, D]."""
        self._kv[self.length] = kv
        self.length += 1

    def attend(self, query: Tensor) -> Tensor:
        """One token's query [1, kv_heads, heads / kv_heads, D] -> the same shape; it sees all there are."""
        keys, values = self._keys.narrow(2, 0, self.length), self._values.narrow(2, 0, self.length)
        return F.scaled_dot_product_attention(query, keys, values)


def attend(qkv: Tensor, contexts: list[Context], heads: int) -> Tensor:
    """Attention of the first tokens of `qkv` [M, heads + 2 kv_heads, D], one a context -> [M, heads * D], padded."""
    num_rows, per_row, dim = qkv.shape
    kv_heads = (per_row - heads) // 2
    queries = qkv[:, :heads].unflatten(1, (kv_heads, -1)).unsqueeze(1)
    if len(contexts) == num_rows == 1:
        return contexts[0].attend(queries[0]).view(1, -1)
    mixed = qkv.new_zeros(num_rows, 1, kv_heads, heads // kv_heads, dim)
    for r, context in enumerate(contexts):
        mixed[r] = context.attend(queries[r])
    return mixed.view(num_rows, heads * dim)
