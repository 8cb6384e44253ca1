"""A Llama checkpoint of a larger shape that computes what a small one computes: its tensors, made one by one."""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from benchmarks.widening.geometry import Widening, check_shapes, constant, widened_eps, widened_theta
from server.models.config import ModelConfig, parse_config, rope_from
from server.models.errors import ModelSourceError
from server.models.random_weights import llama_shapes

_ROPE = ("default", "linear", "llama3")
"""Kinds whose scaling of a frequency depends on that frequency alone."""
_DIMENSIONS = (
    "hidden_size",
    "intermediate_size",
    "num_hidden_layers",
    "num_attention_heads",
    "num_key_value_heads",
    "head_dim",
    "vocab_size",
)
_LAYER = re.compile(r"model\.layers\.(\d+)\.(?:self_attn|mlp)\.(\w+)_proj\.weight")
_MLP = "post_attention_layernorm"
_NORMS = dict.fromkeys(("q", "k", "v"), "input_layernorm") | dict.fromkeys(("gate", "up"), _MLP)


def widened_config(small: dict[str, Any], shape: dict[str, Any]) -> dict[str, Any]:
    """`config.json` contents of `small` with the dimensions of `shape`, never tied. ModelSourceError: no room."""
    narrow = parse_config(small)
    check_model(narrow)
    dimensions = {name: shape[name] for name in _DIMENSIONS if name in shape}
    raw = {k: v for k, v in small.items() if k != "rope_parameters"} | dimensions
    raw |= {"architectures": ["LlamaForCausalLM"], "model_type": "llama", "tie_word_embeddings": False}
    wide = parse_config(raw)
    check_shapes(narrow, wide)
    for what, least, found in (
        ("num_hidden_layers", narrow.num_layers, wide.num_layers),
        ("vocab_size", narrow.vocab_size, wide.vocab_size),
    ):
        if found < least:
            raise ModelSourceError(f"{what}: {found} is less than {least}")
    rope = rope_from(small)
    return raw | {
        "head_dim": wide.head_dim,
        "rms_norm_eps": widened_eps(narrow.rms_norm_eps, narrow, wide, token_constant(narrow)),
        "rope_theta": widened_theta(rope.theta, narrow, wide),
        "rope_scaling": rope.scaling or None,
    }


def check_model(c: ModelConfig) -> None:
    """ModelSourceError if the model has something that is not widened here."""
    odd = {
        "biases": c.attention_bias or c.output_bias or c.mlp_bias,
        "norms of queries and keys": c.qk_norm,
        "layers that see a window": any(window is not None for window in c.sliding_window),
        "layers without rotation": not all(c.rope_layers),
        "rope scaling of this kind": c.rope.scaling.get("rope_type", "default") not in _ROPE,
    }
    found = [what for what, there in odd.items() if there]
    if found:
        raise ModelSourceError(f"a model with {found[0]} is not widened here; Llama models without are")


def token_constant(small: ModelConfig) -> float:
    """The last coordinate of every token's residual stream."""
    return constant(small.hidden_size, small.rms_norm_eps)


class WidenedLlama:
    """Tensors by name, like a checkpoint's, of the model that `widened_config` describes.

    `read` gives the small model's tensors in float32 on `device`, where the work is done; at most one large matrix is
    there in float32 at a time. Layers beyond the small model's are copies of its own in turn whose output projections
    are zero.
    """

    def __init__(
        self,
        small: ModelConfig,
        large: ModelConfig,
        read: Callable[[str], Tensor],
        dtype: torch.dtype,
        device: torch.device,
        seed: int,
    ) -> None:
        self._small, self._large, self._read, self._dtype = small, large, read, dtype
        self._device, self._maps = device, Widening(small, large, device, seed)
        self.shapes = llama_shapes(large)

    def has(self, name: str) -> bool:
        """Whether there is a tensor of that name."""
        return name in self.shapes

    def get(self, name: str) -> Tensor:
        """The tensor. Raises KeyError for a name that the shape does not have."""
        shape = self.shapes[name]
        with torch.no_grad():
            if name == "model.norm.weight":
                return self._maps.final_norm(self._dtype)
            if name == "model.embed_tokens.weight":
                c = token_constant(self._small)
                return self._maps.table(self._read(name), self._large.vocab_size, (c, c), self._dtype)
            if name == "lm_head.weight":
                return self._head()
            if len(shape) == 1:
                return torch.ones(shape, dtype=self._dtype, device=self._device)
            return self._projection(name, shape)

    def _head(self) -> Tensor:
        tied = self._small.tie_word_embeddings
        rows = self._read("model.embed_tokens.weight" if tied else "lm_head.weight")
        return self._maps.head(rows, self._read("model.norm.weight"), self._large.vocab_size, self._dtype)

    def _projection(self, name: str, shape: tuple[int, ...]) -> Tensor:
        found = _LAYER.fullmatch(name)
        assert found is not None
        layer, kind = int(found[1]), found[2]
        own = layer % self._small.num_layers
        if kind in ("o", "down") and layer != own:
            return torch.zeros(shape, dtype=self._dtype, device=self._device)
        weight = self._read(name.replace(f"layers.{layer}.", f"layers.{own}.", 1))
        norm = self._read(f"model.layers.{own}.{_NORMS[kind]}.weight") if kind in _NORMS else None
        return project(self._maps, kind, weight, norm, self._dtype)


def project(maps: Widening, kind: str, weight: Tensor, norm: Tensor | None, dtype: torch.dtype) -> Tensor:
    """A layer's q, k, v, o, gate, up or down projection, `norm` the weights of the norm in front of it, if any.

    Copies of neurons are made after rounding: they are most of the large matrix.
    """
    if norm is None:
        if kind == "o":
            return maps.writes(maps.mixed(weight)).to(dtype)
        return maps.writes(weight / maps.neuron_copies).to(dtype)[:, maps.neuron_of]
    return spread(maps, kind, maps.reads(weight, norm), dtype)


def spread(maps: Widening, kind: str, rows: Tensor, dtype: torch.dtype) -> Tensor:
    """The rows of a q, k, v, gate or up projection that reads the large residual stream already."""
    if kind in ("gate", "up"):
        return rows.to(dtype)[maps.neuron_of]
    return {"q": maps.queries, "k": maps.keys, "v": maps.values}[kind](rows).to(dtype)
