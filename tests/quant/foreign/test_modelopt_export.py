"""What ModelOpt itself exports, read back and run, against its own simulated quantisation."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from server.quant.foreign.detect import foreign_layers
from server.quant.formats import QuantizedWeight, reference_linear
from tests.quant.foreign.layouts import Stored

pytestmark = [pytest.mark.optimize, pytest.mark.filterwarnings("ignore")]
IDS = torch.arange(40).view(2, 20) * 7 % 280


class Quantised(nn.Module):
    def __init__(self, weight: QuantizedWeight) -> None:
        super().__init__()
        self.quantised = weight

    def forward(self, x: Tensor) -> Tensor:
        return reference_linear(x.flatten(0, -2), self.quantised).view(*x.shape[:-1], -1)


def configurations() -> dict[str, tuple[dict[str, Any], str, float]]:
    """A layer's quantisers, the name of our format, and how far logits may be off."""
    weights = "*weight_quantizer"
    inputs = "*input_quantizer"
    group: dict[str, Any] = {"num_bits": 4, "block_sizes": {-1: 32, "type": "static"}}
    return {
        "W4A16_AWQ": ({weights: group}, "int4-g32", 1e-3),
        "W8A16": ({weights: {"num_bits": 8, "axis": 0}}, "int8", 1e-3),
        "FP8_PER_CHANNEL_PER_TOKEN": (
            {
                weights: {"num_bits": (4, 3), "axis": 0},
                inputs: {"num_bits": (4, 3), "type": "dynamic", "block_sizes": {-1: None}},
            },
            "fp8+fp8",
            3e-2,
        ),
    }


@pytest.mark.parametrize("algorithm", list(configurations()))
def test_its_export_computes_what_it_simulated(algorithm: str, tiny_llama_dir: Path, tmp_path: Path) -> None:
    pytest.importorskip("modelopt")
    import modelopt.torch.quantization as mtq
    from modelopt.torch.export import export_hf_checkpoint
    from transformers import AutoModelForCausalLM

    quantizers, form, bound = configurations()[algorithm]
    entries: list[dict[str, Any]] = [{"quantizer_name": "*", "enable": False}]
    entries += [{"quantizer_name": pattern, "cfg": fields} for pattern, fields in quantizers.items()]
    entries += [{"quantizer_name": name, "enable": False} for name in ("*lm_head*", "*embed_tokens*")]
    model: Any = AutoModelForCausalLM.from_pretrained(tiny_llama_dir, dtype=torch.float32)
    model = mtq.quantize(model, {"quant_cfg": entries, "algorithm": "max"}, lambda m: m(IDS))
    with torch.no_grad():
        wanted = model(IDS).logits
    export_hf_checkpoint(copy.deepcopy(model), export_dir=str(tmp_path))

    config = json.loads((tmp_path / "config.json").read_text())
    assert config["quantization_config"]["quant_algo"] == algorithm
    stored = Stored(load_file(tmp_path / "model.safetensors"))
    plain: Any = AutoModelForCausalLM.from_pretrained(tiny_llama_dir, dtype=torch.float32)
    found: dict[str, QuantizedWeight | None] = {}
    for source in (foreign_layers(config), foreign_layers({}, tmp_path)):
        assert source is not None
        found = {n: source.weight(stored, n) for n, m in plain.named_modules() if isinstance(m, nn.Linear)}
        assert found.pop("lm_head", None) is None
    for layer, weight in found.items():
        assert weight is not None
        assert weight.format.name in (form, f"{form}-smooth")
        plain.set_submodule(layer, Quantised(weight))
    with torch.no_grad():
        logits = plain(IDS).logits
    assert float((logits - wanted).norm() / wanted.norm()) < bound
