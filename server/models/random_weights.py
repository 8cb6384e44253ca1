"""Weights drawn at random on the device, for measuring a shape without its files.

What a network computes with them means nothing, but it stays finite and it varies: scales are those of a network at
initialisation (LeCun et al. 1998, "Efficient BackProp", section 4.6; residual outputs by 1/sqrt(2 L) as in GPT-2,
Radford et al. 2019, section 2.3), so activations and logits keep deviations between about a half and 1 through any
number of layers. Two kinds are drawn narrower. Attention's outputs, which average what all tokens have in common: at
full scale that part wins and greedy text is one token for ever. Embeddings: tied to the head, a wide one would make
every token its own most likely successor.
"""

from __future__ import annotations

import json
import math
import os
import zlib
from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor

from server.models.config import ModelConfig
from server.models.shapes import SHAPES, shape
from server.models.source import ModelSource

_RESIDUAL = ("o_proj.weight", "down_proj.weight")
_DAMPED = {"o_proj.weight": 0.2, "embed_tokens.weight": 0.5}
SEED = 20240517


class RandomWeights:
    """Tensors by name, like a checkpoint's: `shapes` says which there are.

    A name and `seed` give the same tensor whatever was drawn before, on the same kind of device. One-dimensional
    weights are norms (ones), biases are zeros; matrices [O, K] are normal with deviation 1/sqrt(K), or
    1/sqrt(2 K `num_layers`) where they write to the residual stream, times what `_DAMPED` says.
    """

    def __init__(
        self,
        shapes: Mapping[str, tuple[int, ...]],
        num_layers: int,
        dtype: torch.dtype,
        device: torch.device,
        seed: int = SEED,
    ) -> None:
        self._shapes, self._num_layers = shapes, num_layers
        self._dtype, self._device, self._seed = dtype, device, seed

    def has(self, name: str) -> bool:
        """Whether there is a tensor of that name."""
        return name in self._shapes

    def get(self, name: str) -> Tensor:
        """The tensor. Raises KeyError for a name that the shape does not have."""
        shape = self._shapes[name]
        if self._device.type == "meta":  # nothing to draw
            return torch.empty(shape, dtype=self._dtype, device=self._device)
        if name.endswith(".bias"):
            return torch.zeros(shape, dtype=self._dtype, device=self._device)
        if len(shape) == 1:
            return torch.ones(shape, dtype=self._dtype, device=self._device)
        deviation = 1.0 / math.sqrt(shape[-1])
        if name.endswith(_RESIDUAL):
            deviation /= math.sqrt(2 * self._num_layers)
        deviation *= next((factor for end, factor in _DAMPED.items() if name.endswith(end)), 1.0)
        generator = torch.Generator(self._device).manual_seed(self._seed ^ zlib.crc32(name.encode()))
        return torch.empty(shape, dtype=self._dtype, device=self._device).normal_(0.0, deviation, generator=generator)


def llama_shapes(c: ModelConfig) -> dict[str, tuple[int, ...]]:
    """Shapes of a Llama-family checkpoint's tensors under their Hugging Face names."""
    query, kv = c.num_heads * c.head_dim, c.num_kv_heads * c.head_dim
    shapes: dict[str, tuple[int, ...]] = {
        "model.embed_tokens.weight": (c.vocab_size, c.hidden_size),
        "model.norm.weight": (c.hidden_size,),
    }
    if not c.tie_word_embeddings:
        shapes["lm_head.weight"] = (c.vocab_size, c.hidden_size)
    linears: dict[str, tuple[tuple[int, int], bool]] = {
        "self_attn.q_proj": ((query, c.hidden_size), c.attention_bias),
        "self_attn.k_proj": ((kv, c.hidden_size), c.attention_bias),
        "self_attn.v_proj": ((kv, c.hidden_size), c.attention_bias),
        "self_attn.o_proj": ((c.hidden_size, query), c.output_bias),
        "mlp.gate_proj": ((c.intermediate_size, c.hidden_size), c.mlp_bias),
        "mlp.up_proj": ((c.intermediate_size, c.hidden_size), c.mlp_bias),
        "mlp.down_proj": ((c.hidden_size, c.intermediate_size), c.mlp_bias),
    }
    norms = {"input_layernorm": c.hidden_size, "post_attention_layernorm": c.hidden_size}
    if c.qk_norm:
        norms |= {"self_attn.q_norm": c.head_dim, "self_attn.k_norm": c.head_dim}
    for layer in range(c.num_layers):
        prefix = f"model.layers.{layer}."
        for name, (size, bias) in linears.items():
            shapes[f"{prefix}{name}.weight"] = size
            if bias:
                shapes[f"{prefix}{name}.bias"] = size[:1]
        for name, width in norms.items():
            shapes[f"{prefix}{name}.weight"] = (width,)
    return shapes


def llama_weights(c: ModelConfig, dtype: torch.dtype, device: torch.device, seed: int = SEED) -> RandomWeights:
    """Every tensor that a checkpoint of this configuration would hold."""
    return RandomWeights(llama_shapes(c), c.num_layers, dtype, device, seed)


def random_source(name: str) -> ModelSource:
    """The model of a named shape or directory whose weights are to be drawn. Raises ModelSourceError."""
    raw = shape(name)
    short = name if name in SHAPES else Path(name).expanduser().resolve().name
    identity = zlib.crc32(json.dumps(raw, sort_keys=True).encode())
    nowhere = Path(os.devnull) / f"{short}-{identity:08x}"  # names it where costs are cached; nothing can lie there
    return ModelSource(directory=nowhere, name=f"{short} (random weights)", config=raw, kind="random")
