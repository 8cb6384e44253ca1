"""Small GGUF files, written as llama.cpp's converter writes them."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from gguf import GGMLQuantizationType, GGUFWriter, TokenType
from gguf.quants import dequantize, quantize
from numpy.typing import NDArray
from tokenizers.pre_tokenizers import ByteLevel

Array = NDArray[np.float32]
Type = GGMLQuantizationType

HEADS, KV_HEADS, HEAD_DIM, HIDDEN, INNER, LAYERS = 4, 2, 16, 64, 96, 2
TOKENS = ["<|endoftext|>", "<|im_start|>", "<|im_end|>", *sorted(ByteLevel.alphabet()), "he", "ll", "<tool>"]
MERGES = ["h e", "l l"]
CHAT_TEMPLATE = "{% for m in messages %}{{ m.content }}{% endfor %}"

_NAMES = {
    "attn_q": ("self_attn.q_proj", (HEADS * HEAD_DIM, HIDDEN)),
    "attn_k": ("self_attn.k_proj", (KV_HEADS * HEAD_DIM, HIDDEN)),
    "attn_v": ("self_attn.v_proj", (KV_HEADS * HEAD_DIM, HIDDEN)),
    "attn_output": ("self_attn.o_proj", (HIDDEN, HEADS * HEAD_DIM)),
    "ffn_gate": ("mlp.gate_proj", (INNER, HIDDEN)),
    "ffn_up": ("mlp.up_proj", (INNER, HIDDEN)),
    "ffn_down": ("mlp.down_proj", (HIDDEN, INNER)),
    "attn_norm": ("input_layernorm", (HIDDEN,)),
    "ffn_norm": ("post_attention_layernorm", (HIDDEN,)),
}
_HEADS_OF = {"attn_q": HEADS, "attn_k": KV_HEADS}


@dataclass
class Spec:
    """What to write. `types` gives the GGML type of a tensor by its GGUF name without layer; others are F32."""

    architecture: str = "llama"
    types: dict[str, Type] = field(default_factory=dict)
    biases: tuple[str, ...] = ()
    norms: bool = False
    tied: bool = True
    metadata: dict[str, Any] = field(default_factory=dict)
    """Overrides by full key; a value of None leaves the key out."""
    extra: dict[str, Array] = field(default_factory=dict)
    vocabulary: int = len(TOKENS)
    """Beyond `TOKENS` there are ones that nothing uses."""


def write_gguf(path: Path, spec: Spec) -> dict[str, Array]:
    """Write the file; return what Hugging Face's state dict should then be."""
    rng = np.random.default_rng(7)
    writer = GGUFWriter(path, spec.architecture)
    _write_metadata(writer, spec)
    expected: dict[str, Array] = {}

    def add(gguf: str, hf: str, shape: tuple[int, ...], kind: str) -> None:
        weights = rng.standard_normal(shape).astype(np.float32) * 0.2
        type_id = spec.types.get(kind, Type.F32) if len(shape) > 1 else Type.F32
        blocks = quantize(weights, type_id)
        expected[hf] = dequantize(blocks, type_id).reshape(shape)
        if spec.architecture in ("llama", "mistral") and kind in _HEADS_OF:
            blocks = permute(blocks, _HEADS_OF[kind])
        writer.add_tensor(gguf, blocks, raw_dtype=type_id)

    add("token_embd.weight", "model.embed_tokens.weight", (spec.vocabulary, HIDDEN), "token_embd")
    for layer in range(LAYERS):
        for kind, (hf, shape) in _NAMES.items():
            add(f"blk.{layer}.{kind}.weight", f"model.layers.{layer}.{hf}.weight", shape, kind)
        for kind in spec.biases:
            hf, shape = _NAMES[kind]
            add(f"blk.{layer}.{kind}.bias", f"model.layers.{layer}.{hf}.bias", shape[:1], kind)
        for kind in ("q", "k") if spec.norms else ():
            add(f"blk.{layer}.attn_{kind}_norm.weight", f"model.layers.{layer}.self_attn.{kind}_norm.weight", (16,), "")
    add("output_norm.weight", "model.norm.weight", (HIDDEN,), "")
    if not spec.tied:
        add("output.weight", "lm_head.weight", (spec.vocabulary, HIDDEN), "output")
    for name, values in spec.extra.items():
        writer.add_tensor(name, values)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return expected


def permute(blocks: NDArray[Any], num_heads: int) -> NDArray[Any]:
    """llama.cpp's row order for rotary embeddings of neighbouring pairs."""
    halves = blocks.reshape(num_heads, 2, len(blocks) // num_heads // 2, *blocks.shape[1:])
    return np.ascontiguousarray(halves.swapaxes(1, 2)).reshape(blocks.shape)


def _write_metadata(writer: GGUFWriter, spec: Spec) -> None:
    more = spec.vocabulary - len(TOKENS)
    types = [TokenType.CONTROL] * 3 + [TokenType.NORMAL] * 258 + [TokenType.USER_DEFINED] + [TokenType.UNUSED] * more
    arch = spec.architecture
    values: dict[str, Any] = {
        f"{arch}.block_count": LAYERS,
        f"{arch}.context_length": 256,
        f"{arch}.embedding_length": HIDDEN,
        f"{arch}.feed_forward_length": INNER,
        f"{arch}.attention.head_count": HEADS,
        f"{arch}.attention.head_count_kv": KV_HEADS,
        f"{arch}.attention.layer_norm_rms_epsilon": 1e-5,
        f"{arch}.rope.freq_base": 10000.0,
        f"{arch}.rope.dimension_count": HEAD_DIM if arch == "llama" else None,
        "tokenizer.ggml.model": "gpt2",
        "tokenizer.ggml.pre": "smollm",
        "tokenizer.ggml.tokens": [*TOKENS, *(f"<unused{i}>" for i in range(more))],
        "tokenizer.ggml.token_type": [int(kind) for kind in types],
        "tokenizer.ggml.merges": MERGES,
        "tokenizer.ggml.bos_token_id": 1,
        "tokenizer.ggml.eos_token_id": 2,
        "tokenizer.ggml.unknown_token_id": 0,
        "tokenizer.ggml.padding_token_id": 2,
        "tokenizer.chat_template": CHAT_TEMPLATE,
        **spec.metadata,
    }
    for key, value in values.items():
        _write_value(writer, key, value)


def _write_value(writer: GGUFWriter, key: str, value: Any) -> None:
    if isinstance(value, bool):
        writer.add_bool(key, value)
    elif isinstance(value, int):
        writer.add_uint32(key, value)
    elif isinstance(value, float):
        writer.add_float32(key, value)
    elif isinstance(value, str):
        writer.add_string(key, value)
    elif value is not None:
        writer.add_array(key, value)
