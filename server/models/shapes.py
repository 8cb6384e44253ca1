"""Named model shapes: what a `config.json` would say, for networks whose weights are drawn at random.

Never imports torch.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from server.models.errors import ModelSourceError

RANDOM = "random:"
"""Begins the name of a model that has a shape and no files. Only the benchmark finds such models; `outpace plan` knows
shapes by their plain names."""

_LLAMA_3 = {
    "architectures": ["LlamaForCausalLM"],
    "hidden_act": "silu",
    "vocab_size": 128256,
    "max_position_embeddings": 131072,
    "rms_norm_eps": 1e-5,
    "rope_theta": 500000.0,
    "eos_token_id": [128001, 128008, 128009],
}
_LLAMA_3_ROPE = {
    "rope_type": "llama3",
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 8192,
}

SHAPES: dict[str, dict[str, Any]] = {
    "llama-3.1-8b": {
        **_LLAMA_3,
        "hidden_size": 4096,
        "intermediate_size": 14336,
        "num_hidden_layers": 32,
        "num_attention_heads": 32,
        "num_key_value_heads": 8,
        "head_dim": 128,
        "rope_scaling": {**_LLAMA_3_ROPE, "factor": 8.0},
        "tie_word_embeddings": False,
    },
    "llama-2-7b": {
        "architectures": ["LlamaForCausalLM"],
        "hidden_act": "silu",
        "vocab_size": 32000,
        "hidden_size": 4096,
        "intermediate_size": 11008,
        "num_hidden_layers": 32,
        "num_attention_heads": 32,
        "num_key_value_heads": 32,
        "head_dim": 128,
        "max_position_embeddings": 4096,
        "rms_norm_eps": 1e-5,
        "rope_theta": 10000.0,
        "eos_token_id": 2,
        "tie_word_embeddings": False,
    },
    "llama-3.2-1b": {
        **_LLAMA_3,
        "hidden_size": 2048,
        "intermediate_size": 8192,
        "num_hidden_layers": 16,
        "num_attention_heads": 32,
        "num_key_value_heads": 8,
        "head_dim": 64,
        "rope_scaling": {**_LLAMA_3_ROPE, "factor": 32.0},
        "tie_word_embeddings": True,
    },
    "smollm2-135m": {
        "architectures": ["LlamaForCausalLM"],
        "hidden_act": "silu",
        "vocab_size": 49152,
        "hidden_size": 576,
        "intermediate_size": 1536,
        "num_hidden_layers": 30,
        "num_attention_heads": 9,
        "num_key_value_heads": 3,
        "head_dim": 64,
        "max_position_embeddings": 8192,
        "rms_norm_eps": 1e-5,
        "rope_theta": 100000.0,
        "eos_token_id": 2,
        "tie_word_embeddings": True,
    },
    "tiny": {
        "architectures": ["LlamaForCausalLM"],
        "hidden_act": "silu",
        "vocab_size": 256,
        "hidden_size": 64,
        "intermediate_size": 128,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 16,
        "max_position_embeddings": 4096,
        "rms_norm_eps": 1e-5,
        "rope_theta": 10000.0,
        "eos_token_id": 2,
        "tie_word_embeddings": False,
    },
}
"""By name. `tiny` is for tests on a CPU."""

SHORT_NAMES = {"llama-3.1-8b": "8b", "llama-2-7b": "7b", "llama-3.2-1b": "1b", "smollm2-135m": "135m"}
"""How result cases call a model."""


def shape(name: str) -> dict[str, Any]:
    """The `config.json` contents of a named shape or of a directory. Raises ModelSourceError saying what works."""
    if name in SHAPES:
        return dict(SHAPES[name])
    file = Path(name).expanduser() / "config.json"
    try:
        raw = json.loads(file.read_text(encoding="utf-8"))
    except (FileNotFoundError, NotADirectoryError):
        known = ", ".join(SHAPES)
        raise ModelSourceError(
            f"{name}: no such shape; use one of {known}, or a directory with a config.json"
        ) from None
    except (OSError, ValueError) as error:
        raise ModelSourceError(f"{file}: cannot be read as JSON: {error}") from error
    if not isinstance(raw, dict):
        raise ModelSourceError(f"{file}: is not a JSON object")
    return raw
