"""A widened model says what the small one says: logits, greedy tokens, masked rows, drafts of an EAGLE-3 head."""

from __future__ import annotations

import json
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

from benchmarks.widen import HEAD_TENSORS, PREFIX, Widened, copy_tokenizer, write
from benchmarks.widening.eagle3 import head_config_json
from benchmarks.widening.geometry import head_map
from draft_models.eagle3_config import Eagle3Config
from draft_models.eagle3_config import parse_config as parse_head
from draft_models.eagle3_weights import Eagle3Weights, load_weights, random_weights
from server.engine.drafters import tensors_of
from server.models.config import RopeConfig, UnsupportedModelError, parse_config
from server.models.errors import ModelSourceError
from server.models.llama import LlamaModel
from server.models.loader import load_source
from server.models.random_weights import llama_shapes
from server.models.source import ModelSource, resolve
from tests.draft_models.test_eagle3_network import Dense, best
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


@pytest.fixture
def small(tmp_path: Path) -> str:
    return write_model(tmp_path / "small")


@pytest.mark.parametrize(
    ("small_changes", "large_changes"),
    [
        ({}, {}),
        ({"tie_word_embeddings": False}, {"num_hidden_layers": 5}),
        ({}, {"head_dim": 12, "num_attention_heads": 6, "num_key_value_heads": 2, "num_hidden_layers": 2}),
        ({"num_key_value_heads": 6}, {"num_attention_heads": 7, "num_key_value_heads": 7, "head_dim": 24}),
        ({"rope_scaling": LLAMA3}, {"head_dim": 32}),
        ({"rope_parameters": {"rope_type": "linear", "rope_theta": 300.0, "factor": 4.0}, "rope_theta": None}, {}),
        ({"rms_norm_eps": 1e-2}, {}),
    ],
    ids=["all", "untied", "stride-1", "mha", "llama3", "linear", "eps"],
)
def test_logits_are_the_small_models(tmp_path: Path, small_changes: Any, large_changes: Any) -> None:
    name = write_model(tmp_path / "small", **small_changes)
    narrow = load(resolve(name))
    wide = load(Widened(LARGE | large_changes)(PREFIX + name))
    ids = prompt()
    expected, found = logits_of(narrow, ids), logits_of(wide, ids)
    assert found.shape == (LENGTH, 100)
    error = (found[:, :61] - expected).abs().max() / expected.abs().max()
    # Where the widths do not divide, frequencies are off by float32's last bit, which a thousand positions magnify.
    assert error < (1e-5 if wide.config.head_dim % 8 == 0 else 1e-4), f"off by {error:.2e}"
    assert torch.equal(found.argmax(dim=-1), expected.argmax(dim=-1))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_masked_rows_lie_far_below_those_that_they_copy(small: str, dtype: torch.dtype) -> None:
    logits = logits_of(load(Widened(LARGE)(PREFIX + small), dtype), prompt(300))
    assert bool(logits.isfinite().all())
    gaps = logits[:, :39] - logits[:, 61:]
    assert float(gaps.min()) > 50.0
    assert int(logits.argmax(dim=-1).max()) < 61


def test_the_constant_survives_every_layer_bit_for_bit(small: str) -> None:
    wide = load(Widened(LARGE)(PREFIX + small), torch.bfloat16)
    features = features_of(wide, prompt(50), (0, 2)).unflatten(-1, (2, -1))
    assert torch.unique(features[..., -1]).tolist() == [2.0**-9]
    assert torch.unique(wide.embedding[:, -1]).tolist() == [2.0**-9]


def test_greedy_text_is_the_small_models(small: str) -> None:
    narrow, wide = load(resolve(small)), load(Widened(LARGE)(PREFIX + small))
    texts = []
    for model in (narrow, wide):
        ids = prompt(20)
        for _ in range(40):
            ids = [*ids, int(logits_of(model, ids)[-1].argmax())]
        texts.append(ids)
    assert texts[0] == texts[1] and len(set(texts[0][20:])) > 5


def test_tensors_depend_on_the_seed_alone(small: str) -> None:
    name = "model.layers.1.mlp.down_proj.weight"
    one, two, other = (
        tensors_of(Widened(LARGE, seed=seed)(PREFIX + small), CPU, torch.float32).get(name) for seed in (1, 1, 2)
    )
    assert torch.equal(one, two) and not torch.equal(one, other)
    sources = [Widened(LARGE, seed=seed)(PREFIX + small) for seed in (1, 2)]
    assert sources[0].directory != sources[1].directory and not sources[0].directory.exists()


def test_weights_are_dense(small: str) -> None:
    """Zeros would cost less than a real model's numbers: less power, so higher clocks."""
    tensors = tensors_of(Widened(LARGE)(PREFIX + small), CPU, torch.float32)
    for name in llama_shapes(parse_config(Widened(LARGE)(PREFIX + small).config)):
        zeros = float((tensors.get(name) == 0).float().mean())
        added = name.startswith("model.layers.2.") and name.endswith(("o_proj.weight", "down_proj.weight"))
        most = 1.0 if added else 0.55 if name.endswith(("q_proj.weight", "k_proj.weight")) else 0.05
        assert zeros <= most, name


def test_written_directories_load_like_any_other(small: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("benchmarks.widen.SHARD_BYTES", 20_000)
    (Path(small) / "tokenizer.json").write_text("{}")
    (Path(small) / "generation_config.json").write_text('{"eos_token_id": [2, 5]}')
    source, out = Widened(LARGE)(PREFIX + small), tmp_path / "wide"
    write(source, out, llama_shapes(parse_config(source.config)), torch.float32, CPU)
    copy_tokenizer(Path(small), out)
    again = resolve(str(out))
    assert len(list(out.glob("*.safetensors"))) > 2 and (out / "tokenizer.json").exists()
    assert parse_config(again.config) == parse_config(source.config)
    assert source.config["eos_token_id"] == [2, 5]
    ids = prompt(40)
    assert torch.equal(logits_of(load(again), ids), logits_of(load(source), ids))


@pytest.mark.parametrize(
    ("small_changes", "large_changes", "message"),
    [
        ({}, {"hidden_size": 24}, "hidden_size: 24 is not larger than 24"),
        ({}, {"head_dim": 6}, "head_dim: 6"),
        ({}, {"intermediate_size": 19}, "intermediate_size: 19"),
        ({}, {"num_key_value_heads": 1}, "20 over 1 have no room for 2 kv"),
        ({}, {"num_attention_heads": 5}, "a kv head has 3 query heads, room is for 2"),
        ({}, {"num_hidden_layers": 1}, "num_hidden_layers: 1 is less than 2"),
        ({}, {"vocab_size": 60}, "vocab_size: 60 is less than 61"),
        ({"attention_bias": True}, {}, "with biases"),
        ({"rope_scaling": {"rope_type": "yarn", "factor": 2.0}}, {}, "rope scaling of this kind"),
        ({"architectures": ["Qwen3ForCausalLM"]}, {}, "norms of queries"),
    ],
)
def test_what_cannot_be_widened(tmp_path: Path, small_changes: Any, large_changes: Any, message: str) -> None:
    name = write_model(tmp_path / "small", **small_changes)
    with pytest.raises(ModelSourceError, match=message):
        Widened(LARGE | large_changes)(PREFIX + name)


def test_every_head_is_there_and_under_its_own_kv_head() -> None:
    smol = parse_config(SMALL | {"num_attention_heads": 9, "num_key_value_heads": 3})
    llama = parse_config(SMALL | {"num_attention_heads": 32, "num_key_value_heads": 8})
    kv_of, head_of = head_map(smol, llama)
    assert kv_of.tolist() == [0, 1, 2, 0, 1, 2, 0, 1]
    assert torch.equal(head_of // 3, kv_of.repeat_interleave(4))
    assert head_of.bincount().tolist() == [4, 4, 4, 4, 4, 4, 3, 3, 2]


# EAGLE-3


def heads(tmp_path: Path, small: str, size: int = 40) -> tuple[ModelSource, ModelSource]:
    head = write_head(tmp_path / "head")
    return resolve(head), Widened(LARGE, small, draft_vocab_size=size)(PREFIX + head)


def dense(source: ModelSource, embedding: Tensor, dtype: torch.dtype = torch.float32) -> Dense:
    config = parse_head(source.config, 3)
    tensors = tensors_of(source, CPU, dtype)
    weights: Eagle3Weights = load_weights(tensors.get, tensors.has, config)
    return Dense(weights, embedding, config)


def test_a_widened_head_drafts_what_the_small_one_drafts(tmp_path: Path) -> None:
    small = write_model(tmp_path / "small", num_hidden_layers=3)
    narrow, wide = load(resolve(small)), load(Widened(LARGE)(PREFIX + small))
    sources = heads(tmp_path, small)
    chains, logits = [], []
    for model, source in zip((narrow, wide), sources, strict=True):
        head, said = dense(source, model.embedding), []

        def pick(row: Tensor, position: int, said: list[Tensor] = said) -> int:
            said.append(row)
            return best(row, position)

        for length in range(20, 60, 2):
            ids = prompt(length)
            chains.append(head.chain(ids, features_of(model, ids[:-1], (0, 1, 2)), 3, pick))
        logits.append(torch.stack(said))
    assert chains[:20] == chains[20:] and len({tuple(chain) for chain in chains}) > 5
    assert logits[1].shape == (60, 40)
    error = (logits[1][:, :DRAFT_VOCAB] - logits[0]).abs().max() / logits[0].abs().max()
    assert error < 1e-5, f"off by {error:.2e}"
    assert float((logits[0][:, :17] - logits[1][:, DRAFT_VOCAB:]).min()) > 50.0


def test_added_draft_ids_are_target_ids_of_their_own(tmp_path: Path, small: str) -> None:
    narrow, wide = heads(tmp_path, small)
    before, after = (dense(s, torch.zeros(1)).w for s in (narrow, wide))
    ids = after.target_ids
    assert torch.equal(ids[:DRAFT_VOCAB], before.target_ids)
    assert len(set(ids.tolist())) == 40 and ids[DRAFT_VOCAB:].tolist() == list(range(83, 100))
    assert torch.equal(tensors_of(wide, CPU, torch.float32).get("t2d"), after.t2d)
    in_half = tensors_of(wide, CPU, torch.bfloat16).get("d2t")
    assert in_half.dtype == torch.int64 and torch.equal(in_half, after.d2t)
    assert parse_head(heads(tmp_path, small, 5)[1].config, 3).draft_vocab_size == DRAFT_VOCAB


def test_a_written_head_is_read_back(tmp_path: Path, small: str) -> None:
    source, out = heads(tmp_path, small)[1], tmp_path / "wide-head"
    write(source, out, HEAD_TENSORS, torch.float32, CPU)
    again = resolve(str(out))
    assert asdict(parse_head(again.config, 3)) == asdict(parse_head(source.config, 3))
    one, two = (dense(s, torch.zeros(1)).w.state_dict() for s in (source, again))
    assert all(torch.equal(two[name], tensor) for name, tensor in one.items())


def test_heads_that_cannot_be_widened(tmp_path: Path, small: str) -> None:
    turned = write_head(tmp_path / "turned", norm_before_residual=True)
    with pytest.raises(ModelSourceError, match="norm_before_residual"):
        Widened(LARGE, small)(PREFIX + turned)
    tight = write_head(tmp_path / "tight", rms_norm_eps=1e-9)
    with pytest.raises(ModelSourceError, match="too small beside the target's"):
        Widened(LARGE, small)(PREFIX + tight)
    deep = write_head(tmp_path / "deep")
    config = json.loads((Path(deep) / "config.json").read_text()) | {"num_hidden_layers": 2}
    (Path(deep) / "config.json").write_text(json.dumps(config))
    with pytest.raises(UnsupportedModelError, match="num_hidden_layers=2"):
        Widened(LARGE, small)(PREFIX + deep)
