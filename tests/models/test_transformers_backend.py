"""transformers' networks on our paged attention against the same networks by themselves."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import transformers

from server.models.config import UnsupportedModelError
from server.models.loader import WeightsError, load_model
from server.models.transformers_backend import supports
from tests.models.paging import Chunk, contiguous_blocks, make_pools, ragged_batch
from tests.models.parity import assert_close, check_parity, random_prompts

# GPT-BigCode's module uses torch.jit.script when it is imported.
pytestmark = pytest.mark.filterwarnings("ignore:`torch.jit.script` is deprecated:DeprecationWarning")

COMMON: dict[str, Any] = {
    "vocab_size": 120,
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
    "initializer_range": 0.2,
}
GPT2: dict[str, Any] = {"n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 64, "initializer_range": 0.2}
EXPERTS = {"num_experts": 4, "num_local_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 32}
ALTERNATE = {"layer_types": ["sliding_attention", "full_attention"], "sliding_window": 5}
CASES: dict[str, tuple[str, dict[str, Any]]] = {
    "gpt2": ("GPT2LMHeadModel", {"vocab_size": 120, **GPT2}),
    "gpt2-scales": ("GPT2LMHeadModel", {"vocab_size": 120, **GPT2, "scale_attn_by_inverse_layer_idx": True}),
    "gpt-neox": ("GPTNeoXForCausalLM", COMMON),
    "gpt-neox-sequential": ("GPTNeoXForCausalLM", COMMON | {"use_parallel_residual": False, "rotary_pct": 0.5}),
    "bigcode-mqa": ("GPTBigCodeForCausalLM", {"vocab_size": 120, **GPT2, "multi_query": True}),
    "bigcode-mha": ("GPTBigCodeForCausalLM", {"vocab_size": 120, **GPT2, "multi_query": False}),
    "starcoder2": ("Starcoder2ForCausalLM", COMMON | {"sliding_window": 6}),
    "phi": ("PhiForCausalLM", COMMON),
    "phi3": ("Phi3ForCausalLM", COMMON | {"sliding_window": 6}),
    "gemma": ("GemmaForCausalLM", COMMON | {"head_dim": 16}),
    "gemma2": ("Gemma2ForCausalLM", COMMON | ALTERNATE | {"head_dim": 8, "attn_logit_softcapping": 1.5}),
    "gemma3": ("Gemma3ForCausalLM", COMMON | ALTERNATE | {"head_dim": 16}),
    "opt": ("OPTForCausalLM", COMMON | {"ffn_dim": 64, "word_embed_proj_dim": 32, "init_std": 0.2}),
    "opt-projected": (
        "OPTForCausalLM",
        COMMON | {"ffn_dim": 64, "word_embed_proj_dim": 16, "do_layer_norm_before": False},
    ),
    "cohere": ("CohereForCausalLM", COMMON | {"logit_scale": 0.25}),
    "cohere2": ("Cohere2ForCausalLM", COMMON | ALTERNATE),
    "olmo": ("OlmoForCausalLM", COMMON),
    "olmo2": ("Olmo2ForCausalLM", COMMON),
    "granite": ("GraniteForCausalLM", COMMON | {"logits_scaling": 3.0, "attention_multiplier": 0.2}),
    "stablelm": ("StableLmForCausalLM", COMMON),
    "glm": ("GlmForCausalLM", COMMON | {"head_dim": 8}),
    "nemotron": ("NemotronForCausalLM", COMMON),
    "mixtral": ("MixtralForCausalLM", COMMON | EXPERTS),
    "qwen3-moe": ("Qwen3MoeForCausalLM", COMMON | EXPERTS | {"head_dim": 8}),
    "gpt-oss": ("GptOssForCausalLM", COMMON | EXPERTS | ALTERNATE | {"head_dim": 8}),
}
REFUSED = ["BloomForCausalLM", "MptForCausalLM", "MambaForCausalLM", "T5ForConditionalGeneration", "RwkvForCausalLM"]


def save(case: str, directory: Path) -> tuple[Any, dict[str, Any]]:
    """Saves a random model; (the reference, what its config.json says)."""
    name, settings = CASES[case]
    torch.manual_seed(0)
    cls = getattr(transformers, name)
    reference = cls._from_config(cls.config_class(**settings), attn_implementation="eager").eval()
    with torch.no_grad():
        for parameter_name, parameter in reference.named_parameters():
            if parameter_name.endswith(("bias", "sinks")):
                parameter.add_(torch.randn_like(parameter) * 0.3)
    reference.save_pretrained(directory)
    return reference, reference.config.to_dict() | {"architectures": [name]}


def load(directory: Path, raw: dict[str, Any], dtype: torch.dtype = torch.float32) -> Any:
    return load_model(directory, raw, torch.device("cpu"), dtype, 64)


@pytest.mark.parametrize("case", CASES)
def test_logits_equal_transformers(case: str, tmp_path: Path) -> None:
    reference, raw = save(case, tmp_path)
    assert supports(raw)
    model = load(tmp_path, raw)
    assert model.num_parameters == sum(p.numel() for p in reference.parameters())
    check_parity(model, reference)
