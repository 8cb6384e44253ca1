from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from server.models.config import parse_config
from server.models.errors import ModelSourceError
from server.models.llama import LlamaModel
from server.models.loader import load_source
from server.models.paging import Span, ragged_batch
from server.models.random_weights import RandomWeights, llama_shapes, llama_weights, random_source
from server.models.shapes import SHAPES, shape
from tests.engine.tiny import Answers, engine, request

CPU = torch.device("cpu")
MILLIONS = {"llama-3.1-8b": 8030.3, "llama-3.2-1b": 1235.8, "smollm2-135m": 134.5}


def answer(raw: dict[str, Any], dtype: torch.dtype, num_tokens: int = 64) -> tuple[torch.Tensor, torch.Tensor]:
    """Random tokens and the logits after each of them."""
    weights = llama_weights(parse_config(raw), dtype, CPU)
    model = LlamaModel(parse_config(raw), weights.get, weights.has, 128)
    kv = model.kv_layers[0]
    pools = [torch.zeros(128, 2 * kv.num_kv_heads, kv.head_dim, dtype=dtype) for _ in model.kv_layers]
    ids = torch.randint(0, model.vocab_size, (num_tokens,), generator=torch.Generator().manual_seed(1))
    batch = ragged_batch([Span(0, num_tokens, list(range(1, 1 + num_tokens // 16)), True)], 16, 0)
    with torch.inference_mode():
        return ids, model.forward(ids, pools, batch, torch.arange(num_tokens))[0]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("changes", [{}, {"num_hidden_layers": 40}, {"tie_word_embeddings": True}], ids=str)
def test_activations_stay_finite_and_the_most_likely_token_varies(dtype: torch.dtype, changes: dict[str, Any]) -> None:
    ids, logits = answer({**SHAPES["tiny"], **changes}, dtype)
    assert logits.isfinite().all()
    assert 0.3 < logits.std().item() < 2.0
    best = logits.argmax(-1)
    assert best.unique().numel() > 16
    assert (best == ids).float().mean() < 0.3  # 64 dimensions are few to be apart in


def test_greedy_text_does_not_get_stuck() -> None:
    """Long contexts, many layers: what all tokens have in common must not outweigh the last token."""
    sizes = {"num_hidden_layers": 24, "hidden_size": 128, "intermediate_size": 256, "vocab_size": 4096}
    raw = {**SHAPES["tiny"], **sizes, "tie_word_embeddings": True}
    weights = llama_weights(parse_config(raw), torch.float32, CPU)
    model = LlamaModel(parse_config(raw), weights.get, weights.has, 160)
    core = engine(model, max_num_seqs=1)
    text = Answers(list(core.generate([request("r", list(range(64)), 40)])))["r"]
    assert len(set(text)) > 20


@pytest.mark.parametrize("name", MILLIONS)
def test_named_shapes_have_the_sizes_of_their_models(name: str) -> None:
    config = parse_config(shape(name))
    sizes = [torch.Size(size).numel() for size in llama_shapes(config).values()]
    assert sum(sizes) / 1e6 == pytest.approx(MILLIONS[name], abs=0.05)
    assert config.num_heads * config.head_dim == config.hidden_size


@pytest.mark.parametrize("architecture", ["LlamaForCausalLM", "Qwen2ForCausalLM", "Qwen3ForCausalLM"])
@pytest.mark.parametrize("bias", [False, True])
def test_a_network_asks_for_every_tensor_and_no_other(architecture: str, bias: bool) -> None:
    raw = {**SHAPES["tiny"], "architectures": [architecture], "attention_bias": bias, "mlp_bias": bias}
    weights = llama_weights(parse_config(raw), torch.float32, CPU)
    asked: list[str] = []

    def get(name: str) -> torch.Tensor:
        asked.append(name)
        return weights.get(name)

    LlamaModel(parse_config(raw), get, weights.has, 64)
    assert sorted(asked) == sorted(llama_shapes(parse_config(raw)))


def test_a_tensor_depends_on_its_name_and_the_seed_only() -> None:
    shapes = {"a.weight": (8, 16), "b.weight": (8, 16), "a.bias": (8,), "norm.weight": (8,)}

    def weights(seed: int = 1) -> RandomWeights:
        return RandomWeights(shapes, 1, torch.float32, CPU, seed)

    first, second = weights(), weights()
    a, b = first.get("a.weight"), first.get("b.weight")
    assert torch.equal(second.get("b.weight"), b) and torch.equal(second.get("a.weight"), a)
    assert not torch.equal(a, b) and not torch.equal(weights(2).get("a.weight"), a)
    assert first.get("a.bias").abs().sum() == 0 and (first.get("norm.weight") == 1).all()
    assert first.has("a.weight") and not first.has("c.weight")


def test_a_directory_gives_its_configuration(tmp_path: Path) -> None:
    raw = {**SHAPES["tiny"], "num_hidden_layers": 1}
    (tmp_path / "config.json").write_text(json.dumps(raw))
    source = random_source(str(tmp_path))
    assert (source.kind, source.config) == ("random", raw)
    assert not (source.directory / "generation_config.json").exists()
    model = load_source(source, CPU, torch.float32, 32)
    assert (len(model.kv_layers), model.vocab_size) == (1, 256)
    assert source.directory != random_source("tiny").directory  # costs are cached by it


@pytest.mark.parametrize(
    ("content", "message"), [(None, "no such shape"), ("{", "as JSON"), ("[]", "not a JSON object")]
)
def test_what_is_no_shape(tmp_path: Path, content: str | None, message: str) -> None:
    if content is not None:
        (tmp_path / "config.json").write_text(content)
    with pytest.raises(ModelSourceError, match=message):
        shape(str(tmp_path))
