"""Tiny models and EAGLE-3 heads to be widened, and what they say."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

from benchmarks.widening.eagle3 import head_config_json
from draft_models.eagle3_config import Eagle3Config
from draft_models.eagle3_weights import random_weights
from server.models.config import RopeConfig, parse_config
from server.models.llama import LlamaModel
from server.models.loader import load_source
from server.models.random_weights import llama_shapes
from server.models.source import ModelSource
from tests.models.paging import BLOCK_SIZE, Chunk, contiguous_blocks, make_pools, ragged_batch, step

SMALL: dict[str, Any] = {
    "architectures": ["LlamaForCausalLM"],
    "vocab_size": 61,
    "hidden_size": 24,
    "intermediate_size": 20,
    "num_hidden_layers": 2,
    "num_attention_heads": 6,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "max_position_embeddings": 4096,
    "rms_norm_eps": 1e-5,
    "rope_theta": 10000.0,
    "eos_token_id": 2,
    "tie_word_embeddings": True,
}
LARGE: dict[str, Any] = {
    "vocab_size": 100,
    "hidden_size": 40,
    "intermediate_size": 47,
    "num_hidden_layers": 3,
    "num_attention_heads": 20,
    "num_key_value_heads": 5,
    "head_dim": 16,
}
LLAMA3 = {
    "rope_type": "llama3",
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64,
}
DRAFT_VOCAB, LENGTH = 23, 1500
CPU = torch.device("cpu")


def write_model(path: Path, **changes: Any) -> str:
    """A random model whose logits vary, with norm weights that are not ones."""
    raw = SMALL | changes
    generator = torch.Generator().manual_seed(1)
    tensors = {}
    for name, shape in llama_shapes(parse_config(raw)).items():
        drawn = torch.randn(shape, generator=generator)
        tensors[name] = 1.0 + 0.3 * drawn if len(shape) == 1 else 1.5 * drawn * shape[-1] ** -0.5
    path.mkdir(parents=True, exist_ok=True)
    save_file(tensors, path / "model.safetensors")
    (path / "config.json").write_text(json.dumps(raw))
    return str(path)


def write_head(path: Path, **changes: Any) -> str:
    """A random EAGLE-3 head for the small model; its heads and width are not the target's."""
    c = Eagle3Config(24, 3, 1, 8, 14, 61, DRAFT_VOCAB, 1e-5, RopeConfig(500.0, {}), (0, 1, 2))
    c = replace(c, **changes)
    weights = random_weights(c, 3)
    for name in ("hidden_norm", "input_layernorm", "post_attention_layernorm", "norm"):
        getattr(weights, name).mul_(1.0 + 0.3 * torch.randn(24, generator=torch.Generator().manual_seed(4)))
    path.mkdir(parents=True, exist_ok=True)
    save_file(weights.state_dict(), path / "model.safetensors")
    (path / "config.json").write_text(json.dumps(head_config_json(c)))
    return str(path)


def load(source: ModelSource, dtype: torch.dtype = torch.float32) -> LlamaModel:
    model = load_source(source, CPU, dtype, 4096)
    assert isinstance(model, LlamaModel)
    return model


def logits_of(model: LlamaModel, ids: list[int]) -> Tensor:
    num_blocks = -(-len(ids) // BLOCK_SIZE)
    return step(model, make_pools(model, num_blocks + 1), [Chunk(ids, 0, contiguous_blocks(1, num_blocks)[0])])[0]


def features_of(model: LlamaModel, ids: list[int], layers: tuple[int, ...]) -> Tensor:
    num_blocks = -(-len(ids) // BLOCK_SIZE)
    tokens, attn = ragged_batch([Chunk(ids, 0, contiguous_blocks(1, num_blocks)[0])])
    with torch.inference_mode():
        features = model.forward(tokens, make_pools(model, num_blocks + 1), attn, torch.tensor([0]), layers)[1]
    assert features is not None
    return features


def prompt(length: int = LENGTH) -> list[int]:
    return torch.randint(0, 61, (length,), generator=torch.Generator().manual_seed(5)).tolist()
