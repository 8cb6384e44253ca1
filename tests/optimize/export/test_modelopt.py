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
from tests.optimize.export.artifacts import everywhere, reference_logits, relative_error, write_artifact

IDS = torch.arange(40).view(2, 20) * 7 % 280


def modelopt(artifact: Path, out: Path, **options: Any) -> None:
    export(ExportOptions(str(artifact), out, "modelopt", **options), lambda text: None)


def dequantised(tensors: dict[str, Tensor], layer: str) -> Tensor:
    """y = (x · pre_quant_scale) @ (q · weight_scale)^T, with the factor on the weight's side."""
    values, scales = tensors[f"{layer}.weight"], tensors[f"{layer}.weight_scale"].numpy()
    if values.dtype != torch.uint8:
        return values.float() * torch.from_numpy(scales)[:, None]
    stored = values.numpy().astype(np.int64)
    numbers = np.zeros((stored.shape[0] * 2, stored.shape[1]), dtype=np.int64)
    numbers[0::2], numbers[1::2] = stored & 15, stored >> 4
    numbers[numbers > 7] -= 16
    weight = numbers * scales[:, np.arange(numbers.shape[1]) * scales.shape[1] // numbers.shape[1]]
    factors = tensors.get(f"{layer}.pre_quant_scale")
    result = torch.from_numpy(weight.astype(np.float32))
    return result if factors is None else result * factors.float()


def logits_of(directory: Path, original: Path, layers: dict[str, QuantizedWeight], fp8: bool) -> Tensor:
    from transformers import AutoModelForCausalLM

    tensors = load_file(directory / "model.safetensors")
    model: Any = AutoModelForCausalLM.from_pretrained(original, dtype=torch.float32)
    plain = {name: t for name, t in tensors.items() if name.rsplit(".", 1)[0] not in layers}
    weights = {f"{name}.weight": dequantised(tensors, name) for name in layers}
    model.load_state_dict(plain | weights, strict=True)
    if fp8:
        for name in layers:
            model.get_submodule(name).register_forward_pre_hook(_rounded)
    with torch.no_grad():
        logits: Tensor = model(IDS).logits
    return logits


def _rounded(module: Any, inputs: tuple[Tensor]) -> tuple[Tensor]:
    scale = inputs[0].abs().amax(-1, keepdim=True) / 448
    return ((inputs[0] / scale).to(torch.float8_e4m3fn).float() * scale,)


@pytest.mark.parametrize(
    ("form", "algorithm"),
    [
        (LinearFormat("fp8", "fp8"), "FP8_PER_CHANNEL_PER_TOKEN"),
        (LinearFormat("int8"), "W8A16"),
        (LinearFormat("int4", group_size=32), "W4A16_AWQ"),
        (LinearFormat("int4", group_size=32, smooth=True), "W4A16_AWQ"),
    ],
    ids=lambda value: value.name if isinstance(value, LinearFormat) else value,
)
def test_its_layout_holds_the_same_weights(
    form: LinearFormat, algorithm: str, tiny_llama_dir: Path, tmp_path: Path
) -> None:
    layers = write_artifact(tmp_path / "artifact", tiny_llama_dir, everywhere(form))
    modelopt(tmp_path / "artifact", tmp_path / "out")
    wanted = reference_logits(tiny_llama_dir, layers, IDS)
    found = logits_of(tmp_path / "out", tiny_llama_dir, layers, fp8=form.activations == "fp8")
    assert relative_error(found, wanted) < (2e-2 if form.activations == "fp8" else 2e-5)
    flat = json.loads((tmp_path / "out" / "config.json").read_text())["quantization_config"]
    nested = json.loads((tmp_path / "out" / "hf_quant_config.json").read_text())["quantization"]
    assert flat["quant_algo"] == nested["quant_algo"] == algorithm
    assert flat["ignore"] == nested["exclude_modules"] == ["lm_head", "model.embed_tokens"]
    if form.weights == "int4":
        assert nested["group_size"] == form.group_size


def test_factors_that_cannot_move_stay_with_their_layer(tiny_llama_dir: Path, tmp_path: Path) -> None:
    form = LinearFormat("int4", group_size=32, smooth=True)
    layers = write_artifact(tmp_path / "artifact", tiny_llama_dir, everywhere(form), unlike_heads=True)
    modelopt(tmp_path / "artifact", tmp_path / "out")
    found = logits_of(tmp_path / "out", tiny_llama_dir, layers, fp8=False)
    assert relative_error(found, reference_logits(tiny_llama_dir, layers, IDS)) < 2e-2  # bfloat16 factors
    tensors = load_file(tmp_path / "out" / "model.safetensors")
    factors = tensors["model.layers.0.self_attn.o_proj.pre_quant_scale"]
    assert factors.dtype == torch.bfloat16
    assert bool((tensors["model.layers.0.mlp.down_proj.pre_quant_scale"] == 1).all())  # moved, and wanted by readers
    assert "model.layers.0.mlp.up_proj.pre_quant_scale" not in tensors


def test_layers_of_several_formats_are_listed(tiny_llama_dir: Path, tmp_path: Path) -> None:
    def choose(name: str) -> LinearFormat | None:
        if "layers" not in name:
            return None
        return LinearFormat("int8") if "self_attn" in name else LinearFormat("int4", group_size=32)

    layers = write_artifact(tmp_path / "artifact", tiny_llama_dir, choose)
    modelopt(tmp_path / "artifact", tmp_path / "out")
    flat = json.loads((tmp_path / "out" / "config.json").read_text())["quantization_config"]
    assert flat["quant_algo"] == "MIXED_PRECISION"
    assert flat["quantized_layers"]["model.layers.1.self_attn.k_proj"] == {"quant_algo": "W8A16"}
    assert flat["quantized_layers"]["model.layers.1.mlp.up_proj"]["group_size"] == 32
    found = logits_of(tmp_path / "out", tiny_llama_dir, layers, fp8=False)
    assert relative_error(found, reference_logits(tiny_llama_dir, layers, IDS)) < 2e-5


@pytest.mark.parametrize(
    ("form", "match"),
    [
        (LinearFormat("int8", "int8"), "one fixed scale a tensor, not one a token"),
        (LinearFormat("int4", "int8", group_size=32), "beside 4-bit weights are FP8"),
        (LinearFormat("int4", group_size=32, minimum=True), "no zero points"),
        (LinearFormat("int4"), "no layout for int4"),
    ],
    ids=lambda value: value.name if isinstance(value, LinearFormat) else "",
)
def test_what_it_cannot_hold_is_refused(form: LinearFormat, match: str, tiny_llama_dir: Path, tmp_path: Path) -> None:
    write_artifact(tmp_path / "artifact", tiny_llama_dir, everywhere(form))
    with pytest.raises(ExportError, match=match):
        modelopt(tmp_path / "artifact", tmp_path / "out")


@pytest.mark.optimize
@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("bits", [4, 8])
def test_modelopt_packs_the_same_integers(bits: int, tiny_llama_dir: Path, tmp_path: Path) -> None:
    pytest.importorskip("modelopt")
    from modelopt.torch.export.quant_utils import pack_int4_in_uint8

    form = LinearFormat("int4", group_size=32) if bits == 4 else LinearFormat("int8")
    layers = write_artifact(tmp_path / "artifact", tiny_llama_dir, everywhere(form))
    modelopt(tmp_path / "artifact", tmp_path / "out")
    tensors = load_file(tmp_path / "out" / "model.safetensors")
    for name, weight in layers.items():
        packed = tensors[f"{name}.weight"]
        if bits == 4:
            assert torch.equal(packed, pack_int4_in_uint8(weight.dequantize(), weight.scales, 32))
        else:
            assert torch.equal(packed, (weight.dequantize() / weight.scales[:, None]).round().to(torch.int8))
