"""transformers' networks on our paged attention against the same networks by themselves."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file

from server.engine.footprint import as_on, tensor_bytes
from server.models.config import UnsupportedModelError
from server.models.loader import WeightsError, load_model
from server.models.transformers_backend import supports
from server.quant.dense import MIN_PACKED_ROWS
from tests.models.paging import Chunk, contiguous_blocks, in_chunks, make_pools, ragged_batch
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
OLD_TRANSFORMERS = int(transformers.__version__.split(".")[0]) < 5
NOT_IN_OLD = ("gpt2-scales", "bigcode-mqa", "bigcode-mha", "opt", "opt-projected", "stablelm", "nemotron")
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
    if OLD_TRANSFORMERS and case in NOT_IN_OLD:
        pytest.skip("transformers 4 has no complete attention interface for this model")
    reference, raw = save(case, tmp_path)
    assert supports(raw)
    model = load(tmp_path, raw)
    assert model.num_parameters == sum(p.numel() for p in reference.parameters())
    check_parity(model, reference)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("case", CASES)
def test_a_sketch_knows_what_the_network_will_hold(case: str, dtype: torch.dtype, tmp_path: Path) -> None:
    if OLD_TRANSFORMERS and case in NOT_IN_OLD:
        pytest.skip("transformers 4 has no complete attention interface for this model")
    _, raw = save(case, tmp_path)
    model = load(tmp_path, raw, dtype)
    sketch = load_model(tmp_path / "absent", raw, torch.device("meta"), dtype, 64)
    as_on(model.device, sketch)
    for name in ("kv_layers", "vocab_size", "num_parameters", "max_position_embeddings", "dtype", "architecture"):
        assert getattr(sketch, name) == getattr(model, name), name
    assert tensor_bytes(sketch) == tensor_bytes(model)


@pytest.mark.parametrize("case", ["gpt2", "gemma2", "cohere", "phi"])
def test_features_are_the_outputs_of_the_named_layers(case: str, tmp_path: Path) -> None:
    reference, raw = save(case, tmp_path)
    model = load(tmp_path, raw)
    prompt = random_prompts(model.vocab_size)[0]
    ids, attn = ragged_batch([Chunk(prompt, 0, contiguous_blocks(1, 8)[0])])
    with torch.inference_mode():
        hidden = reference(torch.tensor([prompt]), use_cache=False, output_hidden_states=True).hidden_states
        logits, features = model.forward(ids, make_pools(model, 9), attn, torch.tensor([22, 3]), (0,))
        without = model.forward(ids, make_pools(model, 9), attn, torch.tensor([22, 3]))
    assert_close(features, hidden[1][0], "features of layer 0")
    assert logits.shape == (2, model.vocab_size)
    assert torch.equal(without[0], logits) and without[1] is None


def test_no_logits_where_none_are_asked_for(tmp_path: Path) -> None:
    _, raw = save("gemma2", tmp_path)
    model = load(tmp_path, raw)
    ids, attn = ragged_batch([Chunk([3, 4, 5], 0, [1])])
    logits, _ = model.forward(ids, make_pools(model, 2), attn, torch.tensor([], dtype=torch.int64))
    assert logits.shape == (0, model.vocab_size)


@pytest.mark.parametrize("case", ["gpt2", "gpt-neox"])
def test_bits_do_not_depend_on_chunks(case: str, tmp_path: Path) -> None:
    _, raw = save(case, tmp_path)
    model = load(tmp_path, raw)
    if model.linear_path != "onednn-packed":
        pytest.skip("this torch has no oneDNN prepacked linear")
    assert model.min_rows == MIN_PACKED_ROWS
    prompt, blocks = random_prompts(model.vocab_size)[0], contiguous_blocks(1, 8)[0]
    whole = in_chunks(model, make_pools(model, 9), prompt, blocks, [23])
    for sizes in ([20, 3], [6, 4, 4, 4, 5], [5] + [1] * 18):
        assert torch.equal(in_chunks(model, make_pools(model, 9), prompt, blocks, sizes, padding=1), whole)


def test_bfloat16_runs_unpacked(tmp_path: Path) -> None:
    reference, raw = save("gpt2", tmp_path)
    model = load(tmp_path, raw, torch.bfloat16)
    assert (model.linear_path, model.min_rows, model.dtype) == ("torch", 1, torch.bfloat16)
    prompt = random_prompts(model.vocab_size)[0]
    expected = reference(torch.tensor([prompt])).logits[0].detach()
    actual = in_chunks(model, make_pools(model, 9), prompt, contiguous_blocks(1, 8)[0], [20, 3])
    assert actual.dtype == torch.float32
    assert_close(actual, expected, "bfloat16", tolerance=0.1)


def test_eos_and_positions_come_from_the_configuration(tmp_path: Path) -> None:
    _, raw = save("gemma", tmp_path)
    model = load(tmp_path, raw)
    assert model.eos_token_ids == (2,) and model.max_position_embeddings == 64
    assert model.architecture == "GemmaForCausalLM"


@pytest.mark.parametrize("name", REFUSED)
def test_other_kinds_of_model_are_refused_with_what_works(name: str, tmp_path: Path) -> None:
    raw = getattr(transformers, name).config_class().to_dict() | {"architectures": [name]}
    assert not supports(raw)
    with pytest.raises(UnsupportedModelError, match=rf"{name} is not supported.*LlamaForCausalLM.*GPT-2"):
        load(tmp_path, raw)


@pytest.mark.parametrize(
    "raw",
    [
        {"architectures": ["NoSuchModel"], "model_type": "gpt2"},
        {"architectures": ["GPT2LMHeadModel"], "model_type": "no-such-type"},
        {"architectures": ["GPT2Model"], "model_type": "gpt2"},
        {"architectures": ["Gemma3ForCausalLM"], "model_type": "gemma3_text", "layer_types": ["chunked_attention"]},
    ],
)
def test_unknown_names_and_layer_types_are_not_supported(raw: dict[str, Any]) -> None:
    assert not supports(raw)


def test_a_model_that_looks_both_ways_is_refused_when_loaded(tmp_path: Path) -> None:
    """BERT's head without `is_decoder`: its configuration passes the first look, its logits do not."""
    torch.manual_seed(0)
    config = transformers.BertConfig(**COMMON, is_decoder=False)
    transformers.BertLMHeadModel(config).save_pretrained(tmp_path)
    raw = config.to_dict() | {"architectures": ["BertLMHeadModel"]}
    if not supports(raw):
        pytest.skip("this transformers' BERT does not pass the first look")
    with pytest.raises(UnsupportedModelError, match="BertLMHeadModel can not be served"):
        load(tmp_path, raw)


def test_keys_and_values_of_different_width_are_refused(tmp_path: Path) -> None:
    torch.manual_seed(0)
    latent = {"kv_lora_rank": 8, "q_lora_rank": 8, "qk_rope_head_dim": 4, "qk_nope_head_dim": 4, "v_head_dim": 6}
    config = transformers.DeepseekV3Config(**COMMON | latent | {"num_key_value_heads": 4, "first_k_dense_replace": 2})
    transformers.DeepseekV3ForCausalLM(config).save_pretrained(tmp_path)
    raw = config.to_dict() | {"architectures": ["DeepseekV3ForCausalLM"]}
    with pytest.raises(
        UnsupportedModelError, match="DeepseekV3ForCausalLM can not be served: keys are 8 wide and values 6"
    ):
        load(tmp_path, raw)


def test_rope_that_depends_on_the_longest_row_needs_a_shorter_context(tmp_path: Path) -> None:
    factors = [1.0, 1.5, 2.0, 2.5]
    rope = {"rope_type": "longrope", "rope_theta": 10000.0, "short_factor": factors, "long_factor": factors}
    torch.manual_seed(0)
    config = transformers.Phi3Config(**COMMON, original_max_position_embeddings=32, rope_parameters=rope)
    reference = transformers.Phi3ForCausalLM._from_config(config, attn_implementation="eager").eval()
    reference.save_pretrained(tmp_path)
    raw = config.to_dict() | {"architectures": ["Phi3ForCausalLM"]}
    with pytest.raises(UnsupportedModelError, match=r"'longrope'.*set max_model_len to at most 32 "):
        load(tmp_path, raw)
    check_parity(load_model(tmp_path, raw, torch.device("cpu"), torch.float32, 32), reference)


def test_missing_tensors_are_named(tmp_path: Path) -> None:
    _, raw = save("gpt-neox", tmp_path)
    file = tmp_path / "model.safetensors"
    tensors = load_file(file)
    del tensors["gpt_neox.final_layer_norm.bias"]
    save_file(tensors, file, metadata={"format": "pt"})
    with pytest.raises(WeightsError, match=r"missing.*final_layer_norm.bias"):
        load(tmp_path, raw)


def test_a_directory_without_weights_is_an_error(tmp_path: Path) -> None:
    _, raw = save("gpt2", tmp_path)
    (tmp_path / "model.safetensors").unlink()
    with pytest.raises(WeightsError, match="safetensors"):
        load(tmp_path, raw)
