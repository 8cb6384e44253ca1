"""A widened model says what the small one says: logits, greedy tokens, and never a masked row's token."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from benchmarks.widen import PREFIX, Widened, copy_tokenizer, write
from benchmarks.widening.geometry import head_map
from server.config import EngineConfig
from server.core import Request, SamplingParams
from server.engine.build import build_engine
from server.models.config import parse_config
from server.models.errors import ModelSourceError
from server.models.loader import tensors_of
from server.models.random_weights import llama_shapes
from server.models.source import resolve
from tests.benchmarks.tiny import CPU, LARGE, LENGTH, LLAMA3, SMALL, features_of, load, logits_of, prompt, write_model


@pytest.fixture(autouse=True)
def _grad_and_threads() -> Iterator[None]:
    """An engine sets both for its process."""
    grad, threads = torch.is_grad_enabled(), torch.get_num_threads()
    yield
    torch.set_grad_enabled(grad)
    torch.set_num_threads(threads)


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


def test_an_engine_is_built_on_it(small: str) -> None:
    said = []
    for name in (small, PREFIX + small):
        config = EngineConfig(model=name, device="cpu", drafter="none", kv_cache_tokens=512, max_model_len=256)
        core, info = build_engine(config, lambda text: None, find=Widened(LARGE))
        assert info.vocab_size == (100 if name.startswith(PREFIX) else 61)
        request = Request("r", prompt(20), SamplingParams(temperature=0.0), max_tokens=30, ignore_eos=True)
        said.append([token for output in core.generate([request]) for token in output.token_ids])
    assert said[0] == said[1] and len(said[0]) == 30


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
