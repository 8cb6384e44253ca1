from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from optimize.export.errors import ExportError
from optimize.export.options import ExportOptions
from optimize.export.run import export
from server.quant.formats import LinearFormat, QuantizedWeight
from tests.optimize.export.artifacts import Choose, everywhere, reference_logits, relative_error, write_artifact

IDS = torch.arange(40).view(2, 20) * 7 % 280
PLACES = [0, 2, 4, 6, 1, 3, 5, 7]


def awq(artifact: Path, out: Path, **options: Any) -> None:
    export(ExportOptions(str(artifact), out, "awq", **options), lambda text: None)


def unpacked(words: Tensor) -> np.ndarray:
    """AutoAWQ's documents: the nibble in place i of a word is the output that `PLACES[i]` says."""
    source = words.numpy().astype(np.int64)
    result = np.zeros((source.shape[0], source.shape[1] * 8), dtype=np.int64)
    for place, output in enumerate(PLACES):
        result[:, output::8] = (source >> (4 * place)) & 15
    return result


def dequantised(tensors: dict[str, Tensor], layer: str) -> Tensor:
    numbers, zeros = unpacked(tensors[f"{layer}.qweight"]), unpacked(tensors[f"{layer}.qzeros"])
    scales = tensors[f"{layer}.scales"].float().numpy()
    group = numbers.shape[0] // scales.shape[0]
    index = np.arange(numbers.shape[0]) // group
    return torch.from_numpy(((numbers - zeros[index]) * scales[index]).T.astype(np.float32))


def logits_of(directory: Path, original: Path, layers: dict[str, QuantizedWeight]) -> Tensor:
    from transformers import AutoModelForCausalLM

    tensors = load_file(directory / "model.safetensors")
    assert not any(f"{name}.weight" in tensors for name in layers)
    model: Any = AutoModelForCausalLM.from_pretrained(original, dtype=torch.float32)
    weights = {f"{name}.weight": dequantised(tensors, name) for name in layers}
    plain = {name: t for name, t in tensors.items() if name.rsplit(".", 1)[0] not in layers}
    model.load_state_dict(plain | weights, strict=True)
    with torch.no_grad():
        logits: Tensor = model(IDS).logits
    return logits


@pytest.mark.parametrize(
    "form",
    [
        LinearFormat("int4", group_size=32),
        LinearFormat("int4", group_size=32, smooth=True),
        LinearFormat("int4", group_size=64, minimum=True),
        LinearFormat("int4", group_size=32, minimum=True, smooth=True),
    ],
    ids=lambda form: form.name,
)
def test_its_layout_holds_the_same_weights(form: LinearFormat, tiny_llama_dir: Path, tmp_path: Path) -> None:
    layers = write_artifact(tmp_path / "artifact", tiny_llama_dir, everywhere(form))
    awq(tmp_path / "artifact", tmp_path / "out")
    # A factor that moves into a float16 scale costs a rounding of it.
    bound = 2e-2 if form.smooth else 2e-5
    wanted = reference_logits(tiny_llama_dir, layers, IDS)
    assert relative_error(logits_of(tmp_path / "out", tiny_llama_dir, layers), wanted) < bound
    config = json.loads((tmp_path / "out" / "config.json").read_text())["quantization_config"]
    assert config["group_size"] == form.group_size
    assert config["modules_to_not_convert"] == ["lm_head"]


def test_groups_of_several_sizes_become_the_smallest(tiny_llama_dir: Path, tmp_path: Path) -> None:
    def choose(name: str) -> LinearFormat | None:
        if not name.startswith("model.layers"):
            return None
        return LinearFormat("int4", group_size=64 if name.endswith("down_proj") else 32)

    layers = write_artifact(tmp_path / "artifact", tiny_llama_dir, choose)
    awq(tmp_path / "artifact", tmp_path / "out")
    wanted = reference_logits(tiny_llama_dir, layers, IDS)
    assert relative_error(logits_of(tmp_path / "out", tiny_llama_dir, layers), wanted) < 2e-5


def mixed(name: str) -> LinearFormat | None:
    return LinearFormat("int8" if "o_proj" in name else "int4", group_size=32) if "layers" in name else None


@pytest.mark.parametrize(
    ("choose", "whole", "match"),
    [
        (everywhere(LinearFormat("int4", group_size=32, minimum=True)), False, r"zero points are whole numbers"),
        (everywhere(LinearFormat("int4", "int8", group_size=32)), True, r"not int4-g32\+int8"),
        (mixed, True, r"2 of 14 layers; first model\.layers\.0\.self_attn\.o_proj \(int8-g32\)"),
        (lambda name: LinearFormat("int4", group_size=32), True, r"first lm_head .*output layer in 16 bits"),
    ],
)
def test_what_it_cannot_hold_is_refused(
    choose: Choose, whole: bool, match: str, tiny_llama_dir: Path, tmp_path: Path
) -> None:
    write_artifact(tmp_path / "artifact", tiny_llama_dir, choose, whole=whole)
    with pytest.raises(ExportError, match=match):
        awq(tmp_path / "artifact", tmp_path / "out")
    assert [path.name for path in tmp_path.iterdir()] == ["artifact"]


def test_scales_too_small_for_float16_are_refused(tiny_llama_dir: Path, tmp_path: Path) -> None:
    from safetensors.torch import save_file

    write_artifact(tmp_path / "artifact", tiny_llama_dir, everywhere(LinearFormat("int4", group_size=32)))
    file = tmp_path / "artifact" / "model.safetensors"
    tensors = load_file(file)
    tensors["model.layers.0.mlp.up_proj.weight_scale"] *= 1e-5
    save_file(tensors, file)
    with pytest.raises(ExportError, match="float16, which does not hold"):
        awq(tmp_path / "artifact", tmp_path / "out")
