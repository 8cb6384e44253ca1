"""Heads whose linear layers are quantised: the files of one, and the network that a GPU runs."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from draft_models.eagle3_config import Eagle3Config, parse_config
from draft_models.eagle3_network import Eagle3Network
from draft_models.eagle3_weights import TENSOR_NAMES, random_weights
from draft_models.eagle_heads import load_head
from server.models.loader import tensors_of
from server.models.source import resolve
from server.quant.formats import LinearFormat
from tests.draft_models.test_eagle3_network import CONFIG
from tests.quant.rounding import write_quantized

CPU = torch.device("cpu")
FORMAT = LinearFormat("int8")
MATRICES = [
    field for field, name in TENSOR_NAMES.items() if name.rpartition(".")[0].endswith(("proj", "fc", "lm_head"))
]


class Target:
    """What a head asks of its target."""

    def __init__(self, config: Eagle3Config) -> None:
        self.embedding = torch.randn(config.vocab_size, config.hidden_size, generator=torch.Generator().manual_seed(1))
        self.config = self.norm = self.head = None

    def output_rows(self, ids: torch.Tensor) -> torch.Tensor:
        raise AssertionError


def write_head(path: Path, config: Eagle3Config) -> Path:
    raw = {
        "architectures": ["LlamaForCausalLMEagle3"],
        "hidden_size": config.hidden_size,
        "num_hidden_layers": 1,
        "num_attention_heads": config.num_heads,
        "num_key_value_heads": config.num_kv_heads,
        "head_dim": config.head_dim,
        "intermediate_size": config.intermediate_size,
        "vocab_size": config.vocab_size,
        "draft_vocab_size": config.draft_vocab_size,
        "rms_norm_eps": config.rms_norm_eps,
        "rope_theta": config.rope.theta,
        "feature_layers": list(config.feature_layers),
    }
    path.mkdir()
    (path / "config.json").write_text(json.dumps(raw))
    state = random_weights(config, seed=3).state_dict()
    save_file({name: tensor.contiguous() for name, tensor in state.items()}, path / "model.safetensors")
    return path


@pytest.mark.parametrize("left", [None, "v_proj", "lm_head"])
def test_layers_stay_quantised_where_all_their_parts_are(tmp_path: Path, left: str | None) -> None:
    plain = write_head(tmp_path / "head", replace(CONFIG, norm_before_residual=False))
    keep = None if left is None else TENSOR_NAMES[left].removesuffix(".weight")
    names = {TENSOR_NAMES[field].removesuffix(".weight") for field in MATRICES} - {keep}
    path = write_quantized(plain, tmp_path / "quantised", lambda layer: FORMAT if layer in names else None)
    source = resolve(str(path))
    config = parse_config(source.config, 32)
    target = Target(config)
    found = load_head(config, tensors_of(source, CPU, torch.float32), target, 64, on_cpu=False)  # type: ignore[arg-type]
    assert isinstance(found, Eagle3Network)
    layers = {
        "fc": found._fc, "q_proj": found._qkv, "v_proj": found._qkv, "o_proj": found._out, "gate_proj": found._gate_up,
        "down_proj": found._down, "lm_head": found._head,
    }  # fmt: skip
    plain_ones = {field for field, layer in layers.items() if layer.format == "float32"}
    assert plain_ones == {None: set(), "v_proj": {"q_proj", "v_proj"}, "lm_head": {"lm_head"}}[left]
    weights = random_weights(config, seed=0)
    tensors = tensors_of(source, CPU, torch.float32)
    for field, name in TENSOR_NAMES.items():
        setattr(weights, field, tensors.get(name))
    expected = Eagle3Network(config, weights, target.embedding, 64)
    torch.testing.assert_close(found._qkv.plain_weight(), expected._qkv.plain_weight())
    features = torch.randn(3, config.feature_width)
    torch.testing.assert_close(found.fuse(features), expected.fuse(features), rtol=1e-4, atol=1e-4)
