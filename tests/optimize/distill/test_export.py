"""What a head's directory holds, in one file or several."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from draft_models.eagle3_config import Eagle3Config, parse_config
from draft_models.eagle3_weights import load_weights, random_weights
from optimize.distill.export import Card, check_file_size, export, spread_over_files
from server.config import ConfigError
from server.models.config import ModelConfig
from server.models.llama import LlamaModel
from server.models.loader import Checkpoint, WeightsError
from server.models.source import resolve

CARD = Card("target", "none", "outpace distill", "Outpace", "CPU", "Text.", "Long.", [(1, 2.0)], [])


def written(
    out: Path, config: Eagle3Config, target: ModelConfig, max_file_bytes: int | None = None
) -> dict[str, torch.Tensor]:
    """Exports a random head and returns what it was."""
    weights = random_weights(config, 4)
    export(out, weights, config, target, CARD, max_file_bytes)
    return weights.state_dict(config.share_lm_head)


def check(out: Path, config: Eagle3Config, expected: dict[str, torch.Tensor], model: LlamaModel) -> None:
    source = resolve(str(out))
    assert parse_config(source.config, 4) == config
    files = Checkpoint(source.directory, torch.bfloat16, torch.device("cpu"))
    weights = load_weights(files.get, files.has, config, model.output_rows)
    for name, tensor in weights.state_dict(config.share_lm_head).items():
        assert torch.equal(tensor, expected[name].to(tensor.dtype)), name


def test_a_head_in_several_files(
    head_config: Eagle3Config, target_config: ModelConfig, model: LlamaModel, tmp_path: Path
) -> None:
    expected = written(tmp_path, head_config, target_config, 50_000)
    names = {file.name for file in tmp_path.iterdir()}
    shards = sorted(name for name in names if name.endswith(".safetensors"))
    assert len(shards) > 2 and shards[0] == f"model-00001-of-{len(shards):05}.safetensors"
    assert names == {*shards, "config.json", "README.md", "model.safetensors.index.json"}
    assert all((tmp_path / shard).stat().st_size <= 50_000 for shard in shards)
    check(tmp_path, head_config, expected, model)
    expected = written(tmp_path, head_config, target_config)  # again, in one file: those of before go
    assert {f.name for f in tmp_path.iterdir()} == {"model.safetensors", "config.json", "README.md"}
    check(tmp_path, head_config, expected, model)
    expected = written(tmp_path, head_config, target_config, 50_000)
    assert not (tmp_path / "model.safetensors").exists()
    check(tmp_path, head_config, expected, model)


def test_a_head_without_an_output_layer(
    head_config: Eagle3Config, target_config: ModelConfig, model: LlamaModel, tmp_path: Path
) -> None:
    shared = replace(head_config, share_lm_head=True)
    expected = written(tmp_path, shared, target_config)
    assert "lm_head.weight" not in expected
    check(tmp_path, shared, expected, model)
    assert "the output layer is the target's own" in (tmp_path / "README.md").read_text()
    raw = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps({**raw, "share_lm_head": False}))
    with pytest.raises(WeightsError, match=f"{tmp_path}: tensor 'lm_head.weight' is missing"):
        check(tmp_path, head_config, expected, model)


def test_a_tensor_that_no_file_may_hold_is_said_before_training(head_config: Eagle3Config) -> None:
    wide = replace(head_config, hidden_size=1024, intermediate_size=4096)
    check_file_size(wide, None)
    check_file_size(wide, 9_000_000)
    with pytest.raises(ConfigError, match=r"max_shard_mb: 8 is not valid; use 9 or more, since midlayer.mlp.gate_proj"):
        check_file_size(wide, 8_000_000)
    large = replace(wide, draft_vocab_size=wide.vocab_size * 64, vocab_size=wide.vocab_size * 64)
    with pytest.raises(ConfigError, match=r"use 38 or more, since lm_head"):
        check_file_size(large, 9_000_000)
    check_file_size(replace(large, share_lm_head=True), 9_000_000)


def test_tensors_stay_in_order() -> None:
    tensors = {str(i): torch.zeros(n) for i, n in enumerate([1, 500, 2000, 1, 1500, 1])}
    parts = spread_over_files(tensors, 8192 + 4 * 2001)
    assert [list(part) for part in parts] == [["0", "1"], ["2", "3"], ["4", "5"]]
    assert spread_over_files(tensors, None) == [tensors]
    assert [list(p) for p in spread_over_files(tensors, 10)] == [[name] for name in tensors]
