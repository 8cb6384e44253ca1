"""EAGLE-1 heads: the layer of eagle3_network between other ends (Li et al. 2024, arXiv 2401.15077, section 4).

A linear `fc` takes [embedding, feature] to the width of the stream, where EAGLE-3 lets attention see both. There is no
norm before attention and none behind the layer, whose output the target's own output layer reads
(eagle/model/cnets1.py: no `input_layernorm` in the first layer, logits are `head(hidden)`).

There is one feature, and it is what the target's output layer reads: the last decoder layer's output *behind* the final
norm. eagle/model/ea_model.py keeps `outputs[0]` of the base model, which modeling_llama_kv.py returns after its
`self.norm`; vLLM hands over the same. The server's features are layer outputs, so the target's final norm is applied
where EAGLE-3 fuses its three. EAGLE-2 heads are EAGLE-1 heads: only their trees differ.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from draft_models.eagle3_checks import Checks
from draft_models.eagle3_config import Eagle3Config
from draft_models.eagle3_cpu_network import Eagle3CpuNetwork
from draft_models.eagle3_network import Eagle3Network
from draft_models.eagle3_ops import Eagle3Ops
from draft_models.eagle3_weights import FC_BIAS, TENSOR_NAMES, read_tensors, weight_shapes
from draft_models.eagle_tensors import EAGLE1_FIELDS, HeadTensors
from server.models.norm import RMSNorm
from server.quant.dense import Linear


@dataclass(slots=True)
class Eagle1Weights:
    """One head, as published: heads' rotary pairs in halves, projections apart.

    H hidden, V vocabulary. `fc` [H, 2 H], `fc_bias` [H] in some; `q_proj` [heads * D, H], `k_proj` and `v_proj`
    [kv_heads * D, H], `o_proj` [H, heads * D]; `gate_proj` and `up_proj` [I, H], `down_proj` [H, I]. `final_norm` and
    `output` are the target's, `output` the head's where it has its own.
    """

    fc: Tensor
    q_proj: Tensor
    k_proj: Tensor
    v_proj: Tensor
    o_proj: Tensor
    post_attention_layernorm: Tensor
    gate_proj: Tensor
    up_proj: Tensor
    down_proj: Tensor
    final_norm: RMSNorm
    output: Linear
    fc_bias: Tensor | None = None

    @property
    def target_ids(self) -> Tensor:
        """Every token can be drafted: [V] int64."""
        return torch.arange(self.output.out_features, device=self.fc.device)


def eagle1_shapes(config: Eagle3Config) -> dict[str, tuple[int, ...]]:
    """Shape of every field that EAGLE1_FIELDS names."""
    h = config.hidden_size
    inner = {f: shape for f, shape in weight_shapes(config).items() if f in EAGLE1_FIELDS}
    narrow = {f: (inner[f][0], h) for f in ("q_proj", "k_proj", "v_proj")}
    return {**inner, **narrow, "fc": (h, 2 * h)}


def load_eagle1(tensors: HeadTensors, config: Eagle3Config, final_norm: RMSNorm, output: Linear) -> Eagle1Weights:
    """Reads a published checkpoint; `final_norm` and `output` are the target's.

    UnsupportedModelError: a shape is not the config's. WeightsError: a tensor is missing or damaged.
    """
    shapes, checks = eagle1_shapes(config), Checks(tensors.file_of)
    head = TENSOR_NAMES["lm_head"]
    if not tensors.has(head):
        del shapes["lm_head"]
    found = read_tensors(tensors.get, {TENSOR_NAMES[field]: shape for field, shape in shapes.items()}, checks)
    fields = {field: found[TENSOR_NAMES[field]] for field in shapes if field != "lm_head"}
    if tensors.has(FC_BIAS):
        fields["fc_bias"] = read_tensors(tensors.get, {FC_BIAS: (config.hidden_size,)}, checks)[FC_BIAS]
    return Eagle1Weights(**fields, final_norm=final_norm, output=Linear(found[head]) if head in found else output)


class Eagle1Network(Eagle3Network):
    """The forward pass on a GPU. What `ops` has no kernel for is left to torch's."""

    def __init__(
        self,
        config: Eagle3Config,
        weights: Eagle1Weights,
        embedding: Tensor,
        max_positions: int,
        ops: Eagle3Ops | None = None,
    ) -> None:
        self._set_up(config, weights, embedding, max_positions, ops)
        bias = weights.fc_bias
        self._fc = Linear(self._own(weights.fc), None if bias is None else self._own(bias))
        self._final_norm, self._head = weights.final_norm, weights.output

    def fuse(self, features: Tensor) -> Tensor:
        """The target's last layer's output [N, H] -> what its output layer reads [N, H]."""
        return self._final_norm(features)

    def _enter(self, token_ids: Tensor, features: Tensor) -> tuple[Tensor, Tensor]:
        """See Eagle3Network: both are the same [N, H] here."""
        x = self._fc(torch.cat([F.embedding(token_ids, self.embedding), features], dim=-1))
        return x, x

    def _leave(self, residual: Tensor, delta: Tensor) -> Tensor:
        """See Eagle3Network."""
        return self._head(residual.add_(delta))


class Eagle1CpuNetwork(Eagle3CpuNetwork):
    """The forward pass on a CPU."""

    def __init__(
        self, config: Eagle3Config, weights: Eagle1Weights, embedding: Tensor, max_positions: int, fast: bool = False
    ) -> None:
        self._set_up(config, weights, embedding, max_positions, fast)
        self._fc = self._linear(weights.fc, bias=weights.fc_bias)
        self._final_norm = weights.final_norm
        self._use_output(weights.output)

    def fuse(self, features: Tensor) -> Tensor:
        """The target's last layer's output [N, H] -> what its output layer reads [N, H]."""
        return self._final_norm(features)

    def _enter(self, embedded: Tensor, x: Tensor) -> tuple[Tensor, Tensor]:
        """See Eagle3CpuNetwork: both are the same [N, H] here."""
        x = self._fc(torch.cat([embedded, x], dim=-1))
        return x, x

    def _logits(self, x: Tensor) -> Tensor:
        return self._head(x)
