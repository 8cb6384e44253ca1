"""Directories of published EAGLE heads as `draft_model`: what an engine makes of them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from draft_models.eagle1 import Eagle1CpuNetwork, eagle1_shapes
from draft_models.eagle3_config import Eagle3Config, parse_config
from draft_models.eagle3_weights import TENSOR_NAMES, random_weights
from server.config import ConfigError, EngineConfig
from server.engine.build import build_engine
from server.models.config import UnsupportedModelError
from server.models.errors import ModelSourceError
from tests.engine.tiny import Answers, request


@pytest.fixture(autouse=True)
def _own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OUTPACE_CACHE", str(tmp_path / "cache"))


def build(target: Path, head: Path, drafter: str = "eagle3") -> Any:
    said: list[str] = []
    config = EngineConfig(
        model=str(target), drafter=drafter, draft_model=str(head), max_draft_tokens=3, num_threads=1, max_num_seqs=2,
        kv_cache_tokens=512, adaptive=False,
    )  # fmt: skip
    return build_engine(config, said.append)[0], said


def write(path: Path, target: Path, version: int, **changes: Any) -> Path:
    """A random head of the target's shape, as EAGLE publishes them."""
    raw = json.loads((target / "config.json").read_text())
    draft = {"draft_vocab_size": 20, "feature_layers": [0, 1, 2]} if version == 3 else {}
    raw = {**raw, "architectures": ["LlamaForCausalLM"], "num_hidden_layers": 1, **draft, **changes}
    config = parse_config(raw, 3)
    path.mkdir()
    (path / "config.json").write_text(json.dumps(raw))
    save_file(tensors(config), path / "model.safetensors")
    return path


def tensors(config: Eagle3Config) -> dict[str, torch.Tensor]:
    if config.version == 3:
        return random_weights(config, 3).state_dict()
    torch.manual_seed(3)
    shapes = {TENSOR_NAMES[f]: shape for f, shape in eagle1_shapes(config).items() if f != "lm_head"}
    drawn = {name: torch.ones(s) if len(s) == 1 else torch.randn(s) * s[1] ** -0.5 for name, s in shapes.items()}
    return {name.replace("midlayer.", "layers.0."): tensor for name, tensor in drawn.items()}


def test_an_eagle1_head_drafts_for_an_engine(loopy_dir: Path, tmp_path: Path, greedy: Any) -> None:
    core, said = build(loopy_dir, write(tmp_path / "head", loopy_dir, 1))
    assert "loading the EAGLE-1 head head" in said
    assert isinstance(core.runner.drafter.network, Eagle1CpuNetwork)
    for prompt in ([5, 6, 7, 8], [48, 26, 38]):
        assert Answers(list(core.generate([request("r", prompt, 24)])))["r"] == greedy(prompt, 24)
    core.check_integrity()


def test_an_eagle1_head_is_no_language_model_to_a_hybrid_drafter(loopy_dir: Path, tmp_path: Path, greedy: Any) -> None:
    core, said = build(loopy_dir, write(tmp_path / "head", loopy_dir, 1), "hybrid")
    assert "loading the EAGLE-1 head head" in said
    assert Answers(list(core.generate([request("r", [5, 6, 7], 16)])))["r"] == greedy([5, 6, 7], 16)


def test_heads_for_other_targets(loopy_dir: Path, tmp_path: Path) -> None:
    wide = write(tmp_path / "wide", loopy_dir, 3, target_hidden_size=4096)
    with pytest.raises(ConfigError, match=r"the head is for a target of width 4096 and 64 tokens; this one has"):
        build(loopy_dir, wide)
    deep = write(tmp_path / "deep", loopy_dir, 3, feature_layers=[2, 16, 29])
    with pytest.raises(ConfigError, match=r"reads the output of layer 29; the target's are 0 to"):
        build(loopy_dir, deep)
    with pytest.raises(UnsupportedModelError, match="EAGLE-1 head with num_hidden_layers="):
        build(loopy_dir, loopy_dir)


def test_weights_in_pickles_are_refused(loopy_dir: Path, tmp_path: Path) -> None:
    head = write(tmp_path / "head", loopy_dir, 1)
    (head / "model.safetensors").rename(head / "pytorch_model.bin")
    with pytest.raises(ModelSourceError, match=r"pytorch_model\.bin is of a format that can run code"):
        build(loopy_dir, head)
