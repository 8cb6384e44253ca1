"""An EAGLE-3 head that can be trained: the network of `draft_models.eagle3_network` with gradients, whole rows at once.

Parameters carry the names of published checkpoints, rotary pairs lie in halves as there.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from draft_models.eagle3_config import Eagle3Config
from draft_models.eagle3_weights import TENSOR_NAMES, Eagle3Weights, weight_shapes
from server.models.config import ModelConfig
from server.models.rope import rotation_table

Get = Callable[[str], Tensor]

_NOISE = 0.02


class Norm(nn.Module):
    """Root-mean-square normalisation over the last axis."""

    def __init__(self, size: int, eps: float) -> None:
        super().__init__()
        self.weight, self.eps = nn.Parameter(torch.ones(size)), eps

    def forward(self, x: Tensor) -> Tensor:
        return F.rms_norm(x, self.weight.shape, self.weight, self.eps)


class _Attention(nn.Module):
    def __init__(self, c: Eagle3Config) -> None:
        super().__init__()
        query, kv = c.num_heads * c.head_dim, c.num_kv_heads * c.head_dim
        self.q_proj = nn.Linear(2 * c.hidden_size, query, bias=False)
        self.k_proj = nn.Linear(2 * c.hidden_size, kv, bias=False)
        self.v_proj = nn.Linear(2 * c.hidden_size, kv, bias=False)
        self.o_proj = nn.Linear(query, c.hidden_size, bias=False)


class _Mlp(nn.Module):
    def __init__(self, c: Eagle3Config) -> None:
        super().__init__()
        self.gate_proj = nn.Linear(c.hidden_size, c.intermediate_size, bias=False)
        self.up_proj = nn.Linear(c.hidden_size, c.intermediate_size, bias=False)
        self.down_proj = nn.Linear(c.intermediate_size, c.hidden_size, bias=False)


class _MidLayer(nn.Module):
    def __init__(self, c: Eagle3Config) -> None:
        super().__init__()
        self.hidden_norm = Norm(c.hidden_size, c.rms_norm_eps)
        self.input_layernorm = Norm(c.hidden_size, c.rms_norm_eps)
        self.self_attn = _Attention(c)
        self.post_attention_layernorm = Norm(c.hidden_size, c.rms_norm_eps)
        self.mlp = _Mlp(c)


class Eagle3Head(nn.Module):
    """`target_ids` [C] int64 are the target's ids of the draft vocabulary, ascending; positions below
    `max_positions`."""

    cos: Tensor
    sin: Tensor
    target_ids: Tensor

    def __init__(self, config: Eagle3Config, target_ids: Tensor, max_positions: int) -> None:
        super().__init__()
        c = self.config = config
        self.fc = nn.Linear(len(c.feature_layers) * c.hidden_size, c.hidden_size, bias=False)
        self.midlayer = _MidLayer(c)
        self.norm = Norm(c.hidden_size, c.rms_norm_eps)
        self.lm_head = nn.Linear(c.hidden_size, c.draft_vocab_size, bias=False)
        table = rotation_table(c.rope, c.head_dim, max_positions, torch.device("cpu"))
        self.register_buffer("cos", table.real.contiguous(), persistent=False)
        self.register_buffer("sin", table.imag.contiguous(), persistent=False)
        self.register_buffer("target_ids", target_ids, persistent=False)

    def project(self, embedded: Tensor, x: Tensor, positions: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Of tokens [B, L] and what the one before hands over, x [B, L, H]: queries [B, heads, L, D], keys and values
        [B, kv_heads, L, D] and the residual stream [B, L, H]."""
        layer, c = self.midlayer, self.config
        normed = layer.hidden_norm(x)
        both = torch.cat([layer.input_layernorm(embedded), normed], dim=-1)
        attn = layer.self_attn
        query, key, value = (
            proj(both).unflatten(-1, (-1, c.head_dim)).transpose(1, 2)
            for proj in (attn.q_proj, attn.k_proj, attn.v_proj)
        )
        cos, sin = self.cos[positions][:, None], self.sin[positions][:, None]
        return turn(query, cos, sin), turn(key, cos, sin), value, normed if c.norm_before_residual else x

    def finish(self, residual: Tensor, mixed: Tensor) -> Tensor:
        """The layer's output [B, L, H] from attention's, mixed [B, heads, L, D]. The stream stays in float32."""
        layer = self.midlayer
        x = residual + layer.self_attn.o_proj(mixed.transpose(1, 2).flatten(2))
        y = layer.post_attention_layernorm(x)
        return torch.add(x, layer.mlp.down_proj(F.silu(layer.mlp.gate_proj(y)) * layer.mlp.up_proj(y)))

    def weights(self) -> Eagle3Weights:
        """What is served, as it is now; tensors are copies on the CPU."""
        state = {name: tensor.detach().float().cpu().clone() for name, tensor in self.named_parameters()}
        c = self.config
        ids = self.target_ids.cpu()
        drawable = torch.zeros(c.vocab_size, dtype=torch.bool).index_fill_(0, ids, True)
        fields = {field: state[name] for field, name in TENSOR_NAMES.items()}
        return Eagle3Weights(**fields, d2t=ids - torch.arange(len(ids)), t2d=drawable)

    @torch.no_grad()
    def load(self, weights: Eagle3Weights) -> None:
        """Takes over weights of the same shape."""
        parameters = dict(self.named_parameters())
        for field, name in TENSOR_NAMES.items():
            parameters[name].copy_(getattr(weights, field))


def turn(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotary embedding of x [B, heads, L, D], pairs in halves; cos and sin [B, 1, L, D / 2]."""
    a, b = x.float().chunk(2, dim=-1)
    return torch.cat([a * cos - b * sin, b * cos + a * sin], dim=-1).to(x.dtype)


def initial_weights(
    config: Eagle3Config, target: ModelConfig, get: Get, has: Callable[[str], bool], target_ids: Tensor, seed: int
) -> Eagle3Weights:
    """Where a head starts: the late features pass through, the layer is the target's last one, which also reads the
    token through the projections of the target's first, and the output layer is the target's rows.

    `get` and `has` are those of the target's checkpoint, in float32 on the CPU. What has another shape than the
    target's is drawn.
    """
    last, first = f"model.layers.{target.num_layers - 1}.", "model.layers.0."
    generator = torch.Generator().manual_seed(seed & (2**63 - 1))
    shapes, h = weight_shapes(config), config.hidden_size

    def drawn(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator) * _NOISE

    def taken(name: str, shape: tuple[int, ...]) -> Tensor:
        tensor = get(name) if has(name) else None
        if tensor is not None and tuple(tensor.shape) == shape:
            return tensor.float()
        return torch.ones(shape) if len(shape) == 1 else drawn(*shape)

    fields = {"fc": torch.cat([drawn(h, h * (len(config.feature_layers) - 1)), torch.eye(h)], dim=1)}
    for name in ("q_proj", "k_proj", "v_proj"):
        half = (shapes[name][0], h)
        parts = [taken(f"{prefix}self_attn.{name}.weight", half) for prefix in (first, last)]
        fields[name] = torch.cat(parts, dim=1)
    fields["input_layernorm"] = taken(f"{first}input_layernorm.weight", (h,))
    fields["hidden_norm"] = taken(f"{last}input_layernorm.weight", (h,))
    fields["o_proj"] = taken(f"{last}self_attn.o_proj.weight", shapes["o_proj"])
    fields["post_attention_layernorm"] = taken(f"{last}post_attention_layernorm.weight", (h,))
    for name in ("gate_proj", "up_proj", "down_proj"):
        fields[name] = taken(f"{last}mlp.{name}.weight", shapes[name])
    fields["norm"] = taken("model.norm.weight", (h,))
    tied = target.tie_word_embeddings or not has("lm_head.weight")
    fields["lm_head"] = get("model.embed_tokens.weight" if tied else "lm_head.weight").float()[target_ids]
    drawable = torch.zeros(config.vocab_size, dtype=torch.bool).index_fill_(0, target_ids, True)
    return Eagle3Weights(**fields, d2t=target_ids - torch.arange(len(target_ids)), t2d=drawable)


def widened(weights: Eagle3Weights, size: int, seed: int) -> Eagle3Weights:
    """The same function with `size` neurons in the MLP, no fewer than there are; new ones write nothing yet."""
    have, hidden = weights.gate_proj.shape
    generator = torch.Generator().manual_seed(seed & (2**63 - 1))
    more = [torch.randn(size - have, hidden, generator=generator) * _NOISE for _ in range(2)]
    return replace(
        weights,
        gate_proj=torch.cat([weights.gate_proj, more[0]]),
        up_proj=torch.cat([weights.up_proj, more[1]]),
        down_proj=torch.cat([weights.down_proj, torch.zeros(hidden, size - have)], dim=1),
    )
