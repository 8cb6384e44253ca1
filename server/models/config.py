"""What the engine needs to know of a model, read from a Hugging Face `config.json`."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

LLAMA_FAMILY = {
    "LlamaForCausalLM": "llama",
    "MistralForCausalLM": "mistral",
    "Qwen2ForCausalLM": "qwen2",
    "Qwen3ForCausalLM": "qwen3",
    "SmolLM3ForCausalLM": "smollm3",
}
"""Architectures with a network definition of our own; all others go through transformers."""

LENGTH_DEPENDENT_ROPE = ("dynamic", "longrope")
"""Frequencies that change once the longest position of the *batch* passes a bound: rows would disturb each other."""


class UnsupportedModelError(ValueError):
    """The model can not be served; the message says what can."""


@dataclass(frozen=True, slots=True)
class RopeConfig:
    """Rotary position embedding: base `theta` and Hugging Face's scaling parameters (`{}` for none)."""

    theta: float
    scaling: dict[str, Any]


@dataclass(frozen=True, slots=True)
class ModelConfig:
    """Shape of a decoder. `sliding_window[i]` bounds layer i's attention to that many tokens (None: all);
    `rope_layers[i]` says whether layer i rotates at all."""

    architecture: str
    vocab_size: int
    hidden_size: int
    num_layers: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    intermediate_size: int
    max_position_embeddings: int
    rms_norm_eps: float
    rope: RopeConfig
    tie_word_embeddings: bool
    attention_bias: bool
    output_bias: bool
    mlp_bias: bool
    qk_norm: bool
    sliding_window: tuple[int | None, ...]
    rope_layers: tuple[bool, ...]
    eos_token_ids: tuple[int, ...]


def architecture_of(raw: dict[str, Any]) -> str:
    """The first entry of `architectures`, or an UnsupportedModelError."""
    names = raw.get("architectures") or []
    if not names:
        raise UnsupportedModelError("config.json names no architecture ('architectures' is missing or empty)")
    return str(names[0])


def rope_from(raw: dict[str, Any]) -> RopeConfig:
    """Reads both spellings: `rope_parameters` (transformers 5) and `rope_theta` + `rope_scaling` (4)."""
    params = dict(raw.get("rope_parameters") or raw.get("rope_scaling") or {})
    theta = params.pop("rope_theta", None) or raw.get("rope_theta") or 10000.0
    kind = params.get("rope_type") or params.get("type") or "default"
    params["rope_type"] = kind
    return RopeConfig(theta=float(theta), scaling={} if kind == "default" else params)


def check_rope_length(raw: dict[str, Any], max_positions: int) -> None:
    """Raises UnsupportedModelError if sequences of `max_positions` tokens would change the rotation of shorter ones."""
    text = raw.get("text_config") or raw
    params = text.get("rope_parameters") or text.get("rope_scaling") or {}
    for entry in [p for p in params.values() if isinstance(p, dict)] or [params]:  # one entry, or one a layer type
        kind = entry.get("rope_type") or entry.get("type")
        bound = entry.get("original_max_position_embeddings") or text.get("original_max_position_embeddings")
        bound = int(bound or text.get("max_position_embeddings") or 0)
        if kind in LENGTH_DEPENDENT_ROPE and max_positions > bound:
            raise UnsupportedModelError(
                f"rope type {kind!r} changes every token's rotation once a sequence passes {bound} tokens; "
                f"set max_model_len to at most {bound} (it is {max_positions})"
            )


def eos_ids(raw: dict[str, Any]) -> tuple[int, ...]:
    """End-of-sequence ids as a tuple, whether the file has an integer, a list or nothing."""
    eos = raw.get("eos_token_id")
    if eos is None:
        return ()
    return tuple(int(e) for e in eos) if isinstance(eos, list) else (int(eos),)


def _windows(raw: dict[str, Any], num_layers: int) -> tuple[int | None, ...]:
    window = raw.get("sliding_window")
    kinds = raw.get("layer_types")
    if kinds:
        return tuple(window if kind == "sliding_attention" else None for kind in kinds)
    if window is None or raw.get("use_sliding_window") is False:
        return (None,) * num_layers
    if "use_sliding_window" in raw:
        first = int(raw.get("max_window_layers", 0))
        return tuple(window if i >= first else None for i in range(num_layers))
    if architecture_of(raw) == "MistralForCausalLM":
        return (int(window),) * num_layers
    return (None,) * num_layers


def parse_config(raw: dict[str, Any]) -> ModelConfig:
    """A ModelConfig of a Llama-family `config.json`.

    Raises UnsupportedModelError for another architecture or a feature that our network does not compute.
    """
    arch = architecture_of(raw)
    if arch not in LLAMA_FAMILY:
        raise UnsupportedModelError(f"{arch} has no network definition here; supported: {', '.join(LLAMA_FAMILY)}")
    if raw.get("hidden_act", "silu") not in ("silu", "swish"):
        raise UnsupportedModelError(f"{arch} with hidden_act={raw['hidden_act']!r}: only 'silu' is supported")
    heads = int(raw["num_attention_heads"])
    hidden = int(raw["hidden_size"])
    layers = int(raw["num_hidden_layers"])
    qwen2 = arch == "Qwen2ForCausalLM"
    bias = bool(raw.get("attention_bias", False))
    no_rope = raw.get("no_rope_layers") if arch == "SmolLM3ForCausalLM" else None
    return ModelConfig(
        architecture=arch,
        vocab_size=int(raw["vocab_size"]),
        hidden_size=hidden,
        num_layers=layers,
        num_heads=heads,
        num_kv_heads=int(raw.get("num_key_value_heads") or heads),
        head_dim=int(raw.get("head_dim") or hidden // heads),
        intermediate_size=int(raw["intermediate_size"]),
        max_position_embeddings=int(raw.get("max_position_embeddings", 2048)),
        rms_norm_eps=float(raw.get("rms_norm_eps", 1e-6)),
        rope=rope_from(raw),
        tie_word_embeddings=bool(raw.get("tie_word_embeddings", False)),
        attention_bias=bias or qwen2,
        output_bias=bias and not qwen2,
        mlp_bias=bool(raw.get("mlp_bias", False)),
        qk_norm=arch == "Qwen3ForCausalLM",
        sliding_window=_windows(raw, layers),
        rope_layers=tuple(bool(r) for r in no_rope) if no_rope else (True,) * layers,
        eos_token_ids=eos_ids(raw),
    )
