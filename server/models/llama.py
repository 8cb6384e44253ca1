"""Llama and its family (Mistral, Qwen2, Qwen3, SmolLM, SmolLM3) on paged attention: few, fat operations."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property, partial

import torch
import torch.nn.functional as F
from torch import Tensor

from server.models.attention import AttentionBatch, paged_attention, write_kv
from server.models.base import KVLayer
from server.models.config import ModelConfig
from server.models.errors import WeightsError
from server.models.norm import RMSNorm
from server.models.rope import interleave_rows, rotate_, rotation_table
from server.quant.build import Joined, Weight, linear_of, min_rows, parts_of
from server.quant.formats import QuantizedWeight, can_join, join, stacked
from server.quant.layer import LinearLayer

Get = Callable[[str], Weight]
"""Reads the tensor of a Hugging Face name on the target's device, in its dtype or as a quantised layer's is stored."""


@dataclass(slots=True)
class Layer:
    """Weights of one decoder layer; qkv and gate/up are fused, or joined behind one call where formats differ."""

    input_norm: RMSNorm
    qkv: LinearLayer
    q_norm: RMSNorm | None
    k_norm: RMSNorm | None
    out: LinearLayer
    post_norm: RMSNorm
    gate_up: LinearLayer
    down: LinearLayer
    window: int | None
    rotates: bool


class LlamaModel:
    """The network. Implements server.models.base.TargetModel."""

    def __init__(self, config: ModelConfig, get: Get, has: Callable[[str], bool], max_positions: int) -> None:
        self.config = config
        c = config
        self.architecture = c.architecture
        self.vocab_size = c.vocab_size
        self.max_position_embeddings = c.max_position_embeddings
        self.kv_layers = [KVLayer(c.num_kv_heads, c.head_dim)] * c.num_layers
        self.eos_token_ids = c.eos_token_ids
        self._table = get("model.embed_tokens.weight")
        typical = self._table if isinstance(self._table, Tensor) else plain(get("model.norm.weight"))
        self.device, self.dtype = typical.device, typical.dtype
        self.layers = [_load_layer(c, i, get, self.dtype) for i in range(c.num_layers)]
        self.norm = RMSNorm(plain(get("model.norm.weight")), c.rms_norm_eps)
        tied = c.tie_word_embeddings or not has("lm_head.weight")
        self.head = linear_of(self._table if tied else get("lm_head.weight"), dtype=self.dtype)
        self.rotations = rotation_table(c.rope, c.head_dim, max_positions, self.device)
        linears = [part for layer in self.linears().values() for part in parts_of(layer)]
        self.linear_path = " | ".join(dict.fromkeys(part.path for part in linears))
        self.min_rows = max(min_rows(part) for part in linears)
        self.num_parameters = count_parameters(c)

    @cached_property
    def embedding(self) -> Tensor:
        """The table [V, H] in the network's dtype; of a quantised one it is made when first asked for, and kept."""
        table = self._table
        return table if isinstance(table, Tensor) else table.dequantize(self.dtype)

    def linears(self) -> dict[str, LinearLayer]:
        """The linear layers by name, those that run as one under one name."""
        named: dict[str, LinearLayer] = {}
        for i, layer in enumerate(self.layers):
            prefix = f"model.layers.{i}."
            named[f"{prefix}self_attn.qkv_proj"] = layer.qkv
            named[f"{prefix}self_attn.o_proj"] = layer.out
            named[f"{prefix}mlp.gate_up_proj"] = layer.gate_up
            named[f"{prefix}mlp.down_proj"] = layer.down
        return {**named, "lm_head": self.head}

    def layer_paths(self) -> dict[str, tuple[str, str]]:
        """Of each linear layer how it is stored and what computes it (`server.engine.linear_layers`)."""
        return {name: (layer.format, layer.path) for name, layer in self.linears().items()}

    def _embed(self, token_ids: Tensor) -> Tensor:
        table = self._table
        return (
            F.embedding(token_ids, table) if isinstance(table, Tensor) else table.rows(token_ids).dequantize(self.dtype)
        )

    def forward(
        self,
        token_ids: Tensor,
        pools: list[Tensor],
        attn: AttentionBatch,
        logits_at: Tensor,
        feature_layers: tuple[int, ...] = (),
    ) -> tuple[Tensor, Tensor | None]:
        """See TargetModel.forward."""
        x = self._embed(token_ids)
        rotation = self.rotations[attn.positions].unsqueeze(1)
        features: list[Tensor] = []
        for i, (layer, pool) in enumerate(zip(self.layers, pools, strict=True)):
            x = self._attention(layer, x, pool, attn, rotation).add_(x)
            x = self._mlp(layer, x).add_(x)
            if i in feature_layers:
                features.append(x)
        return self.head(self.norm(x[logits_at])).float(), torch.cat(features, dim=-1) if features else None

    def output_rows(self, ids: Tensor) -> Tensor:
        """Rows `ids` [C] int64 of the output layer, [C, H]: a copy unless they are all of them in order."""
        weight = self.head.plain_weight().to(self.dtype)
        whole = len(ids) == len(weight) and bool((ids == torch.arange(len(ids), device=ids.device)).all())
        return weight if whole else weight[ids]

    def _attention(self, layer: Layer, x: Tensor, pool: Tensor, attn: AttentionBatch, rotation: Tensor) -> Tensor:
        c = self.config
        num_tokens = x.shape[0]
        qkv = layer.qkv(layer.input_norm(x)).reshape(num_tokens, c.num_heads + 2 * c.num_kv_heads, c.head_dim)
        qk = qkv[:, : c.num_heads + c.num_kv_heads]
        if layer.q_norm is not None and layer.k_norm is not None:
            qk[:, : c.num_heads] = layer.q_norm(qk[:, : c.num_heads])
            qk[:, c.num_heads :] = layer.k_norm(qk[:, c.num_heads :])
        if layer.rotates:
            rotate_(qk, rotation)
        write_kv(pool, attn.slot_mapping, qkv[:, c.num_heads :])
        mixed = paged_attention(qkv[:, : c.num_heads], pool, attn, scale=c.head_dim**-0.5, window=layer.window)
        return layer.out(mixed)

    def _mlp(self, layer: Layer, x: Tensor) -> Tensor:
        gate, up = layer.gate_up(layer.post_norm(x)).chunk(2, dim=-1)
        return layer.down(F.silu(gate).mul_(up))


def _load_layer(c: ModelConfig, index: int, get: Get, dtype: torch.dtype) -> Layer:
    prefix = f"model.layers.{index}."

    def linear(names: list[str], bias: bool) -> LinearLayer:
        weights = [_maybe_interleave(n, get(f"{prefix}{n}.weight"), c) for n in names]
        biases = [plain(_maybe_interleave(n, get(f"{prefix}{n}.bias"), c)) for n in names] if bias else []
        return _together(weights, biases, dtype)

    def norm(name: str) -> RMSNorm:
        return RMSNorm(plain(get(f"{prefix}{name}.weight")), c.rms_norm_eps)

    def head_norm(name: str) -> RMSNorm | None:
        if not c.qk_norm:
            return None
        weight = plain(get(f"{prefix}self_attn.{name}.weight"))
        return RMSNorm(interleave_rows(weight, c.head_dim), c.rms_norm_eps)

    return Layer(
        input_norm=norm("input_layernorm"),
        qkv=linear(["self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"], c.attention_bias),
        q_norm=head_norm("q_norm"),
        k_norm=head_norm("k_norm"),
        out=linear(["self_attn.o_proj"], c.output_bias),
        post_norm=norm("post_attention_layernorm"),
        gate_up=linear(["mlp.gate_proj", "mlp.up_proj"], c.mlp_bias),
        down=linear(["mlp.down_proj"], c.mlp_bias),
        window=c.sliding_window[index],
        rotates=c.rope_layers[index],
    )


def _together(weights: list[Weight], biases: list[Tensor], dtype: torch.dtype) -> LinearLayer:
    """One layer of all outputs, of several where formats differ. `biases` are of all parts, or none."""
    dense = [w for w in weights if isinstance(w, Tensor)]
    stored = [w for w in weights if isinstance(w, QuantizedWeight)]
    bias = stacked(biases) if biases else None
    if not stored:
        return linear_of(stacked(dense), bias)
    if not dense and can_join(stored):
        return linear_of(join(stored), bias, dtype=dtype)
    each: Sequence[Tensor | None] = biases or [None] * len(weights)
    return Joined([linear_of(w, b, dtype=dtype) for w, b in zip(weights, each, strict=True)])


def _maybe_interleave(name: str, weight: Weight, c: ModelConfig) -> Weight:
    if not name.endswith(("q_proj", "k_proj")):
        return weight
    if isinstance(weight, Tensor):
        return interleave_rows(weight, c.head_dim)
    return weight.reordered(partial(interleave_rows, head_dim=c.head_dim))


def plain(tensor: Weight) -> Tensor:
    """A tensor that no format quantises. Raises WeightsError for one that is listed as a layer all the same."""
    if isinstance(tensor, Tensor):
        return tensor
    raise WeightsError(
        f"config.json: quantization_config lists a layer of format {tensor.format.name} that is no matrix"
    )


def count_parameters(c: ModelConfig) -> int:
    """Of the network that a configuration describes, tied tables once."""
    attention = c.hidden_size * c.head_dim * (2 * c.num_heads + 2 * c.num_kv_heads)
    mlp = 3 * c.hidden_size * c.intermediate_size
    tables = c.vocab_size * c.hidden_size * (1 if c.tie_word_embeddings else 2)
    return c.num_layers * (attention + mlp + 2 * c.hidden_size) + tables + c.hidden_size
