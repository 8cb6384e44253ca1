"""A small decoder of the Llama family that can be trained: `server.models.llama` with gradients, whole rows at once.

Parameters carry Hugging Face names, rotary pairs lie in halves as there. The residual stream stays in float32.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from optimize.distill.head import Norm, turn
from optimize.distill.packing import Batch
from optimize.distill.target import within
from server.models.config import ModelConfig
from server.models.rope import rotation_table

Get = Callable[[str], Tensor]


class _Attention(nn.Module):
    def __init__(self, c: ModelConfig) -> None:
        super().__init__()
        query, kv = c.num_heads * c.head_dim, c.num_kv_heads * c.head_dim
        self.q_proj = nn.Linear(c.hidden_size, query, bias=c.attention_bias)
        self.k_proj = nn.Linear(c.hidden_size, kv, bias=c.attention_bias)
        self.v_proj = nn.Linear(c.hidden_size, kv, bias=c.attention_bias)
        self.o_proj = nn.Linear(query, c.hidden_size, bias=c.output_bias)
        self.q_norm = Norm(c.head_dim, c.rms_norm_eps) if c.qk_norm else None
        self.k_norm = Norm(c.head_dim, c.rms_norm_eps) if c.qk_norm else None
        self.head_dim, self.groups = c.head_dim, c.num_heads // c.num_kv_heads

    def forward(self, x: Tensor, mask: Tensor, rotation: tuple[Tensor, Tensor] | None) -> Tensor:
        query, key, value = (
            proj(x).unflatten(-1, (-1, self.head_dim)).transpose(1, 2)
            for proj in (self.q_proj, self.k_proj, self.v_proj)
        )
        if self.q_norm is not None and self.k_norm is not None:
            query, key = self.q_norm(query).to(value.dtype), self.k_norm(key).to(value.dtype)
        if rotation is not None:
            query, key = turn(query, *rotation), turn(key, *rotation)
        key, value = (t.repeat_interleave(self.groups, dim=1) for t in (key, value))
        mixed = F.scaled_dot_product_attention(query, key, value, attn_mask=mask)
        return self.o_proj(mixed.transpose(1, 2).flatten(2))  # type: ignore[no-any-return]


class _Mlp(nn.Module):
    def __init__(self, c: ModelConfig) -> None:
        super().__init__()
        self.gate_proj = nn.Linear(c.hidden_size, c.intermediate_size, bias=c.mlp_bias)
        self.up_proj = nn.Linear(c.hidden_size, c.intermediate_size, bias=c.mlp_bias)
        self.down_proj = nn.Linear(c.intermediate_size, c.hidden_size, bias=c.mlp_bias)

    def forward(self, x: Tensor) -> Tensor:
        return self.down_proj(F.silu(self.gate_proj(x)) * self.up_proj(x))  # type: ignore[no-any-return]


class _Layer(nn.Module):
    def __init__(self, c: ModelConfig, index: int) -> None:
        super().__init__()
        self.input_layernorm = Norm(c.hidden_size, c.rms_norm_eps)
        self.self_attn = _Attention(c)
        self.post_attention_layernorm = Norm(c.hidden_size, c.rms_norm_eps)
        self.mlp = _Mlp(c)
        self.window, self.rotates = c.sliding_window[index], c.rope_layers[index]


class _Decoder(nn.Module):
    def __init__(self, c: ModelConfig) -> None:
        super().__init__()
        self.embed_tokens = nn.Embedding(c.vocab_size, c.hidden_size)
        self.layers = nn.ModuleList(_Layer(c, i) for i in range(c.num_layers))
        self.norm = Norm(c.hidden_size, c.rms_norm_eps)


class SmallLM(nn.Module):
    """The network of `config`, for positions below `max_positions`. Implements small_lm_student.LanguageModel."""

    cos: Tensor
    sin: Tensor

    def __init__(self, config: ModelConfig, max_positions: int) -> None:
        super().__init__()
        c = self.config = config
        self.model = _Decoder(c)
        self.lm_head = None if c.tie_word_embeddings else nn.Linear(c.hidden_size, c.vocab_size, bias=False)
        table = rotation_table(c.rope, c.head_dim, max_positions, torch.device("cpu"))
        self.register_buffer("cos", table.real.contiguous(), persistent=False)
        self.register_buffer("sin", table.imag.contiguous(), persistent=False)

    @property
    def output_weight(self) -> Tensor:
        """The output layer's rows [V, H]; tied, they are the embedding's."""
        return self.model.embed_tokens.weight if self.lm_head is None else self.lm_head.weight

    def vocabulary(self) -> list[nn.Parameter]:
        """Embedding and output layer."""
        modules = [self.model.embed_tokens] if self.lm_head is None else [self.model.embed_tokens, self.lm_head]
        return [module.get_parameter("weight") for module in modules]

    def hidden(self, batch: Batch) -> Tensor:
        """What the output layer reads, [B, L, H]."""
        sees = batch.sees()
        masks: dict[int | None, Tensor] = {None: sees[:, None]}
        rotation = self.cos[batch.positions][:, None], self.sin[batch.positions][:, None]
        x = self.model.embed_tokens(batch.ids)
        for layer in self.model.layers:
            assert isinstance(layer, _Layer)
            window = layer.window
            if window not in masks:
                masks[window] = (sees & within(sees.shape[1], window or sees.shape[1], sees.device))[:, None]
            y = layer.self_attn(layer.input_layernorm(x), masks[window], rotation if layer.rotates else None)
            x = x + y
            x = x + layer.mlp(layer.post_attention_layernorm(x))
        normed: Tensor = self.model.norm(x)
        return normed

    @torch.no_grad()
    def load(self, get: Get, layers: tuple[int, ...] | None = None) -> None:
        """Takes its weights from a checkpoint; layer i is `layers`[i] there. Raises WeightsError."""
        for name, parameter in self.named_parameters():
            parameter.copy_(get(renamed(name, "model.layers", layers)))

    def tensors(self) -> dict[str, Tensor]:
        """What a checkpoint holds; copies on the CPU."""
        return {name: tensor.detach().float().cpu().clone() for name, tensor in self.named_parameters()}


def renamed(name: str, prefix: str, layers: tuple[int, ...] | None) -> str:
    """The name in the target of a small LM's tensor: `prefix`.2.x is `prefix`.{layers[2]}.x there."""
    if layers is None or not name.startswith(prefix + "."):
        return name
    index, rest = name.removeprefix(prefix + ".").split(".", 1)
    return f"{prefix}.{layers[int(index)]}.{rest}"
