"""GGUF metadata to a Hugging Face `config.json` and `generation_config.json` (Llama family)."""

from __future__ import annotations

import math
from typing import Any

import numpy as np

from server.models.errors import ModelSourceError
from server.models.gguf import GgufFile, dequantize

ARCHITECTURES: dict[str, tuple[str, str]] = {
    "llama": ("llama", "LlamaForCausalLM"),
    "mistral": ("mistral", "MistralForCausalLM"),
    "qwen2": ("qwen2", "Qwen2ForCausalLM"),
    "qwen3": ("qwen3", "Qwen3ForCausalLM"),
}
_LLAMA3_LOW_FREQ_FACTOR, _LLAMA3_HIGH_FREQ_FACTOR = 1.0, 4.0
_LLAMA3_CONTEXTS = (8192, 4096, 2048, 16384, 32768)


def hf_config(file: GgufFile) -> dict[str, Any]:
    """The `config.json` of the model in `file`, in the form that transformers 4.57 and 5.x both read.

    Rotary settings use `rope_theta` and `rope_scaling`: transformers 5 turns them into `rope_parameters` itself.
    Raises `ModelSourceError` for an architecture or a feature outside the Llama family.
    """
    _refuse_unsupported(file)
    model_type, class_name = ARCHITECTURES[file.architecture]
    num_heads = _required_int(file, "attention.head_count")
    hidden = _required_int(file, "embedding_length")
    config: dict[str, Any] = {
        "architectures": [class_name],
        "model_type": model_type,
        "hidden_size": hidden,
        "intermediate_size": _required_int(file, "feed_forward_length"),
        "num_hidden_layers": _required_int(file, "block_count"),
        "num_attention_heads": num_heads,
        "num_key_value_heads": _uniform_int(file, "attention.head_count_kv", num_heads),
        "head_dim": int(file.field("attention.key_length") or hidden // num_heads),
        "max_position_embeddings": _required_int(file, "context_length"),
        "rms_norm_eps": _shortest(file.field("attention.layer_norm_rms_epsilon", 1e-6)),
        "rope_theta": _shortest(file.field("rope.freq_base", 10000.0)),
        "rope_scaling": None,
        "vocab_size": file.tensors["token_embd.weight"].shape[0],
        "tie_word_embeddings": "output.weight" not in file.tensors,
        "hidden_act": "silu",
        "attention_dropout": 0.0,
        "use_cache": True,
        "dtype": "float32",
        "torch_dtype": "float32",
        **_token_ids(file),
    }
    _check_head(file, config["head_dim"])
    config["rope_scaling"] = _rope_scaling(file, config)
    _add_biases_and_window(file, config)
    return config


def generation_config(config: dict[str, Any], file: GgufFile) -> dict[str, Any]:
    """The `generation_config.json`: every id that ends a reply (end of sequence, of turn, of message)."""
    names = ("eos_token_id", "eot_token_id", "eom_token_id")
    ids = [file.metadata.get(f"tokenizer.ggml.{name}") for name in names]
    ends = list(dict.fromkeys(int(i) for i in ids if i is not None))
    result = {"bos_token_id": config["bos_token_id"], "pad_token_id": config["pad_token_id"]}
    return {**result, "eos_token_id": ends[0] if len(ends) == 1 else ends or None}


def rope_factors(file: GgufFile) -> np.ndarray[Any, np.dtype[np.float32]] | None:
    """Per-frequency divisors [head_dim / 2] that the file carries for Llama-3 scaling, else None."""
    tensor = file.tensors.get("rope_freqs.weight")
    return None if tensor is None else dequantize(file.blocks(tensor.name), tensor.type_id).reshape(-1)


def _refuse_unsupported(file: GgufFile) -> None:
    if file.architecture not in ARCHITECTURES:
        known = ", ".join(ARCHITECTURES)
        raise ModelSourceError(
            f"{file.path}: architecture {file.architecture!r} is not supported; GGUF files of {known} are. "
            "Other models can be served from their Hugging Face safetensors directory"
        )
    if file.field("expert_count", 0):
        raise ModelSourceError(f"{file.path}: mixture-of-experts models are not supported; dense models are")
    if "token_embd.weight" not in file.tensors:
        raise ModelSourceError(f"{file.path}: there is no tensor 'token_embd.weight'; a vocabulary-only or split file?")
    if int(file.metadata.get("split.count", 0)) > 1:
        raise ModelSourceError(
            f"{file.path}: one part of a split model; join the parts with `llama-gguf-split --merge`"
        )


def _required_int(file: GgufFile, key: str) -> int:
    return _uniform_int(file, key, None)


def _uniform_int(file: GgufFile, key: str, default: int | None) -> int:
    value = file.field(key, default)
    if isinstance(value, list):
        if len(set(value)) != 1:
            raise ModelSourceError(f"{file.path}: {file.architecture}.{key} differs between layers; not supported")
        value = value[0]
    if value is None:
        raise ModelSourceError(f"{file.path}: metadata key {file.architecture}.{key} is missing")
    if not isinstance(value, int) or value < 1:
        raise ModelSourceError(f"{file.path}: metadata key {file.architecture}.{key} is {value!r}, not a count")
    return value


def _shortest(value: float) -> float:
    """The shortest decimal that is the same float32: 1e-05, not 9.999999747378752e-06."""
    return float(str(np.float32(value)))


def _token_ids(file: GgufFile) -> dict[str, int | None]:
    def token_id(name: str) -> int | None:
        value = file.metadata.get(f"tokenizer.ggml.{name}")
        return None if value is None else int(value)

    return {
        "bos_token_id": token_id("bos_token_id"),
        "eos_token_id": token_id("eos_token_id"),
        "pad_token_id": token_id("padding_token_id"),
    }


def _check_head(file: GgufFile, head_dim: int) -> None:
    rotary = int(file.field("rope.dimension_count") or head_dim)
    value_dim = int(file.field("attention.value_length") or head_dim)
    if (rotary, value_dim) != (head_dim, head_dim):
        raise ModelSourceError(
            f"{file.path}: key width {head_dim}, value width {value_dim}, rotary width {rotary}: "
            "only models where the three agree are supported"
        )


def _rope_scaling(file: GgufFile, config: dict[str, Any]) -> dict[str, Any] | None:
    factors = rope_factors(file)
    if factors is not None:
        return _llama3_scaling(file, factors, config)
    kind = str(file.field("rope.scaling.type", "none"))
    factor = float(file.field("rope.scaling.factor", file.field("rope.scale_linear", 1.0)) or 1.0)
    if factor == 1.0:
        return None
    if kind in ("linear", "none"):
        return {"rope_type": "linear", "type": "linear", "factor": factor}
    if kind == "yarn":
        original = file.field("rope.scaling.original_context_length")
        context = int(original or round(config["max_position_embeddings"] / factor))
        return {"rope_type": "yarn", "type": "yarn", "factor": factor, "original_max_position_embeddings": context}
    raise ModelSourceError(f"{file.path}: rope scaling {kind!r} is not supported; none, linear, yarn and llama3 are")


def _llama3_scaling(
    file: GgufFile, factors: np.ndarray[Any, np.dtype[np.float32]], config: dict[str, Any]
) -> dict[str, Any] | None:
    """GGUF keeps Llama-3 scaling only as the divisors that follow from it: find the parameters that give them."""
    factor = _shortest(float(factors.max()))
    if factor == 1.0:
        return None
    for context in _LLAMA3_CONTEXTS:
        expected = llama3_factors(config["rope_theta"], config["head_dim"], factor, context)
        if expected.shape == factors.shape and np.allclose(expected, factors, rtol=1e-4):
            return {
                "rope_type": "llama3",
                "factor": factor,
                "low_freq_factor": _LLAMA3_LOW_FREQ_FACTOR,
                "high_freq_factor": _LLAMA3_HIGH_FREQ_FACTOR,
                "original_max_position_embeddings": context,
            }
    raise ModelSourceError(f"{file.path}: the rotary divisors in 'rope_freqs.weight' follow no scaling rule known here")


def llama3_factors(
    theta: float, head_dim: int, factor: float, original_context: int
) -> np.ndarray[Any, np.dtype[np.float64]]:
    """Llama-3.1's divisors of the rotary frequencies, float64 [head_dim / 2] (llama-models, `apply_scaling`)."""
    wavelengths = 2 * math.pi * theta ** (np.arange(0, head_dim, 2) / head_dim)
    low = original_context / _LLAMA3_LOW_FREQ_FACTOR
    high = original_context / _LLAMA3_HIGH_FREQ_FACTOR
    span = _LLAMA3_HIGH_FREQ_FACTOR - _LLAMA3_LOW_FREQ_FACTOR
    smooth = (original_context / wavelengths - _LLAMA3_LOW_FREQ_FACTOR) / span
    between = 1 / ((1 - smooth) / factor + smooth)
    return np.where(wavelengths > low, factor, np.where(wavelengths < high, 1.0, between))


def _add_biases_and_window(file: GgufFile, config: dict[str, Any]) -> None:
    if config["model_type"] in ("llama", "qwen3"):
        config["attention_bias"] = any(f"blk.0.attn_{part}.bias" in file.tensors for part in ("q", "k", "v", "output"))
    if config["model_type"] == "llama":
        config["mlp_bias"] = any(f"blk.0.ffn_{part}.bias" in file.tensors for part in ("gate", "up", "down"))
    window = file.field("attention.sliding_window")
    if config["model_type"] in ("qwen2", "qwen3"):
        config["use_sliding_window"] = False
    elif window:
        config.update(model_type="mistral", architectures=["MistralForCausalLM"], sliding_window=int(window))
        config.pop("attention_bias", None)
        config.pop("mlp_bias", None)
    elif config["model_type"] == "mistral":
        config["sliding_window"] = None
