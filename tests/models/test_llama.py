"""Our Llama-family network against transformers' own, on small random configurations."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from torch import Tensor

from server.models.config import parse_config
from server.models.llama import LlamaModel
from server.models.loader import load_model
from tests.models.paging import Chunk, contiguous_blocks, in_chunks, make_pools, ragged_batch, scattered_blocks, step
from tests.models.parity import assert_close, check_parity, random_prompts, spelled_for_installed

BASE: dict[str, Any] = {
    "vocab_size": 131,
    "hidden_size": 48,
    "intermediate_size": 80,
    "num_hidden_layers": 3,
    "num_attention_heads": 6,
    "num_key_value_heads": 2,
    "max_position_embeddings": 128,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
    "tie_word_embeddings": False,
    "initializer_range": 0.2,
}
LLAMA3_ROPE = {
    "rope_type": "llama3",
    "rope_theta": 500.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 16,
}
YARN = {"rope_type": "yarn", "rope_theta": 1000.0, "factor": 4.0, "original_max_position_embeddings": 32}
CASES: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("Llama", {}),
    "tied": ("Llama", {"tie_word_embeddings": True}),
    "mha": ("Llama", {"num_key_value_heads": 6}),
    "mqa": ("Llama", {"num_key_value_heads": 1}),
    "head-dim": ("Llama", {"head_dim": 16}),
    "attention-bias": ("Llama", {"attention_bias": True}),
    "mlp-bias": ("Llama", {"mlp_bias": True}),
    "rope-llama3": ("Llama", {"rope_parameters": LLAMA3_ROPE}),
    "rope-linear": ("Llama", {"rope_parameters": {"rope_type": "linear", "rope_theta": 100.0, "factor": 4.0}}),
    "rope-yarn": ("Llama", {"rope_parameters": YARN}),
    "rope-yarn-factor": ("Llama", {"rope_parameters": {**YARN, "attention_factor": 0.7, "truncate": False}}),
    "mistral": ("Mistral", {"sliding_window": None}),
    "mistral-window": ("Mistral", {"sliding_window": 6}),
    "qwen2": ("Qwen2", {}),
    "qwen2-window": ("Qwen2", {"use_sliding_window": True, "sliding_window": 5, "max_window_layers": 1}),
    "qwen3": ("Qwen3", {"head_dim": 16}),
    "qwen3-bias-tied": ("Qwen3", {"head_dim": 8, "attention_bias": True, "tie_word_embeddings": True}),
    "smollm3": ("SmolLM3", {"no_rope_layers": [1, 0, 1]}),
}


def build(case: str) -> tuple[Any, dict[str, Any]]:
    """(a random transformers model, what its config.json says)."""
    family, changes = CASES[case]
    torch.manual_seed(0)
    config = getattr(transformers, f"{family}Config")(**BASE | spelled_for_installed(changes))
    reference = getattr(transformers, f"{family}ForCausalLM")(config).eval()
    with torch.no_grad():
        for name, parameter in reference.named_parameters():
            if name.endswith("bias") or "norm" in name:  # initialised to 0 and 1, which would hide a missing one
                parameter.add_(torch.randn_like(parameter) * 0.3)
    return reference, config.to_dict() | {"architectures": [f"{family}ForCausalLM"]}


def ours(reference: Any, raw: dict[str, Any]) -> LlamaModel:
    """Our network with the reference's weights."""
    weights: dict[str, Tensor] = dict(reference.state_dict())
    return LlamaModel(parse_config(raw), weights.__getitem__, weights.__contains__, 128)


@pytest.mark.parametrize("case", CASES)
def test_logits_equal_transformers(case: str) -> None:
    reference, raw = build(case)
    check_parity(ours(reference, raw), reference)


def test_number_of_parameters_is_the_models_own() -> None:
    for case in ("llama", "tied"):
        reference, raw = build(case)
        assert ours(reference, raw).num_parameters == sum(p.numel() for p in reference.parameters())


@pytest.mark.parametrize("case", ["mistral-window", "qwen3"])
def test_features_are_the_outputs_of_the_named_layers(case: str) -> None:
    reference, raw = build(case)
    model = ours(reference, raw)
    prompt = random_prompts(model.vocab_size)[0]
    with torch.inference_mode():
        hidden = reference(torch.tensor([prompt]), use_cache=False, output_hidden_states=True).hidden_states
        ids, attn = ragged_batch([Chunk(prompt, 0, contiguous_blocks(1, 8)[0])])
        logits, features = model.forward(ids, make_pools(model, 9), attn, torch.tensor([3]), (0, 1))
    assert logits.shape == (1, model.vocab_size)
    assert features is not None
    assert_close(features, torch.cat([hidden[1][0], hidden[2][0]], dim=-1), "features")


@pytest.mark.parametrize("case", ["llama", "tied"])
def test_rows_of_the_output_layer(case: str) -> None:
    reference, raw = build(case)
    model, rows = ours(reference, raw), reference.get_output_embeddings().weight
    assert torch.equal(model.output_rows(torch.tensor([5, 0, 7])), rows[[5, 0, 7]])
    assert torch.equal(model.output_rows(torch.arange(model.vocab_size)), rows)
    backwards = torch.arange(model.vocab_size).flip(0)
    assert torch.equal(model.output_rows(backwards), rows[backwards])


def test_logits_only_where_asked() -> None:
    reference, raw = build("llama")
    model = ours(reference, raw)
    prompt = random_prompts(model.vocab_size)[0]
    blocks = contiguous_blocks(1, 8)[0]
    whole = step(model, make_pools(model, 9), [Chunk(prompt, 0, blocks)])[0]
    ids, attn = ragged_batch([Chunk(prompt, 0, blocks)])
    at = torch.tensor([22, 4, 4])
    with torch.inference_mode():
        logits, features = model.forward(ids, make_pools(model, 9), attn, at)
    assert features is None
    assert_close(logits, whole[at], "selected logits")


def test_bfloat16_stays_close() -> None:
    reference, raw = build("qwen3")
    expected = reference(torch.tensor([random_prompts(131)[0]])).logits[0]
    weights = {name: tensor.bfloat16() for name, tensor in reference.state_dict().items()}
    model = LlamaModel(parse_config(raw), weights.__getitem__, weights.__contains__, 128)
    prompt = random_prompts(131)[0]
    logits = step(model, make_pools(model, 9), [Chunk(prompt, 0, contiguous_blocks(1, 8)[0])])[0]
    assert model.linear_path == "torch" and model.min_rows == 1
    assert logits.dtype == torch.float32
    assert_close(logits, expected.detach(), "bfloat16", tolerance=0.1)


@pytest.mark.parametrize("case", ["llama", "tied", "qwen2"])
def test_loads_a_saved_directory(case: str, tmp_path: Path) -> None:
    reference, raw = build(case)
    reference.save_pretrained(tmp_path, max_shard_size="40KB")
    model = load_model(tmp_path, raw, torch.device("cpu"), torch.float32, 64)
    check_parity(model, reference)
    assert model.eos_token_ids == (2,)


@pytest.mark.parametrize("case", ["llama", "mistral-window", "qwen3"])
def test_bits_do_not_depend_on_chunks_or_company(case: str) -> None:
    """What makes drafts, chunked prefill, prefix hits and preemption invisible in the output."""
    reference, raw = build(case)
    model = ours(reference, raw)
    if model.linear_path != "onednn-packed":
        pytest.skip("this torch has no oneDNN prepacked linear")
    prompts = random_prompts(model.vocab_size)
    for layout in (contiguous_blocks, scattered_blocks):
        blocks = layout(3, 8)
        alone = [in_chunks(model, make_pools(model, 25), p, b, [len(p)]) for p, b in zip(prompts, blocks, strict=True)]
        for sizes in ([20, 3], [6, 4, 4, 4, 5], [5] + [1] * 18):
            chunked = in_chunks(model, make_pools(model, 25), prompts[0], blocks[0], sizes, padding=model.min_rows - 1)
            assert torch.equal(chunked, alone[0]), f"{sizes}, {layout.__name__}"
        pools = make_pools(model, 25)
        step(model, pools, [Chunk(p[:5], 0, b) for p, b in zip(prompts, blocks, strict=True)])
        together = step(model, pools, [Chunk(p[5:], 5, b) for p, b in zip(prompts, blocks, strict=True)], padding=1)
        for actual, whole in zip(together, alone, strict=True):
            assert torch.equal(actual, whole[5:]), layout.__name__
