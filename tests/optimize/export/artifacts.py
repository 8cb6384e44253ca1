"""Tiny quantised models in our own layout, and the network that they are."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Mapping
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from server.quant import checkpoint
from server.quant.formats import FP8, LinearFormat, QuantizedWeight, reference_linear

Choose = Callable[[str], LinearFormat | None]


def quantise(weight: Tensor, form: LinearFormat, whole: bool = True) -> QuantizedWeight:
    """Rounded to nearest. `whole`: minimums are whole multiples of the scales. Factors of activations, where the format
    has them, are drawn, and equal for columns i and i + 16 (heads of 16 columns that share a key-value head)."""
    rows, columns = weight.shape
    inputs = None
    if form.smooth:
        generator = torch.Generator().manual_seed(columns)
        inputs = (torch.rand(columns // 32, 1, 16, generator=generator) + 0.5).expand(-1, 2, -1).reshape(columns)
        weight = weight / inputs
    grouped = weight.view(rows, -1, form.group_size or columns)
    limit = {"fp8": 448.0, "int8": 127.0, "int4": 7.0}[form.weights]
    minimums = None
    if form.minimum:
        low = 0 if form.weights == "int4" else -128
        high = 15 if form.weights == "int4" else 127
        scales = ((grouped.amax(-1) - grouped.amin(-1)) / (high - low)).half().float()
        zeros = (low - grouped.amin(-1) / scales).round().clamp(low, high)
        minimums = -zeros * scales if whole else -(zeros + 0.25) * scales
        numbers = ((grouped - minimums.unsqueeze(-1)) / scales.unsqueeze(-1)).round().clamp(low, high)
    else:
        scales = (grouped.abs().amax(-1) / limit).half().float()
        numbers = grouped / scales.unsqueeze(-1)
        if form.weights != "fp8":
            numbers = numbers.round().clamp(-limit - 1, limit)
    values = numbers.reshape(rows, columns)
    if form.weights == "int4":
        small = (values if form.minimum else values + 8).to(torch.uint8)
        stored = small[:, 0::2] | (small[:, 1::2] << 4)
    else:
        stored = values.clamp(-448, 448).to(FP8) if form.weights == "fp8" else values.to(torch.int8)
    if form.group_size is None:
        scales, minimums = scales.squeeze(1), None if minimums is None else minimums.squeeze(1)
    return QuantizedWeight(form, stored, scales, minimums, inputs)


def everywhere(form: LinearFormat) -> Choose:
    """All layers of the decoder; factors of activations only where no norm could take them."""

    def choose(name: str) -> LinearFormat | None:
        if not name.startswith("model.layers."):
            return None
        return form if name.endswith(("o_proj", "down_proj")) else replace(form, smooth=False)

    return choose


def write_artifact(
    out: Path, original: Path, choose: Choose, *, whole: bool = True, unlike_heads: bool = False
) -> dict[str, QuantizedWeight]:
    """A quantised copy of a float32 model; returns the quantised layers."""
    shutil.copytree(original, out)
    tensors = load_file(out / "model.safetensors")
    layers: dict[str, QuantizedWeight] = {}
    stored: dict[str, Tensor] = {}
    for name, tensor in tensors.items():
        layer = name.removesuffix(".weight")
        form = choose(layer) if tensor.dim() == 2 else None
        if form is None:
            stored[name] = tensor
            continue
        weight = quantise(tensor, form, whole)
        if unlike_heads and weight.input_scales is not None:
            weight = replace(weight, input_scales=torch.linspace(0.5, 1.5, tensor.shape[1]))
        layers[layer] = weight
        parts: dict[str, Tensor | None] = {
            checkpoint.VALUES: weight.values,
            checkpoint.SCALES: weight.scales,
            checkpoint.MINIMUMS: weight.minimums,
            checkpoint.INPUT_SCALES: weight.input_scales,
        }
        stored |= {f"{layer}.{part}": value for part, value in parts.items() if value is not None}
    save_file(stored, out / "model.safetensors", metadata={"format": "pt"})
    config = json.loads((out / "config.json").read_text())
    fields: Mapping[str, Mapping[str, Any]] = {name: asdict(weight.format) for name, weight in layers.items()}
    config["quantization_config"] = checkpoint.quantization_config(fields)
    (out / "config.json").write_text(json.dumps(config))
    return layers


class Quantised(nn.Module):
    """The oracle of a quantised layer as a module of transformers' network.

    `halves`: int8 activations are divided by the row's largest / 127.5, as the package compressed-tensors does where
    vLLM and we take 127.
    """

    def __init__(self, weight: QuantizedWeight, bias: Tensor | None, halves: bool = False) -> None:
        super().__init__()
        self.bias = bias
        self.quantised, self.halves = weight, halves and weight.format.activations == "int8"

    def forward(self, x: Tensor) -> Tensor:
        rows, weight = x.flatten(0, -2), self.quantised
        if self.halves:
            rows = rows if weight.input_scales is None else rows * weight.input_scales
            steps = rows.abs().amax(-1, keepdim=True) / 127.5
            rows = (rows / steps).round().clamp(-128, 127) * steps
            result = rows @ weight.dequantize().t()
            return (result if self.bias is None else result + self.bias).view(*x.shape[:-1], -1)
        return reference_linear(rows, weight, self.bias).view(*x.shape[:-1], -1)


def reference_logits(
    original: Path, layers: Mapping[str, QuantizedWeight], ids: Tensor, halves: bool = False
) -> Tensor:
    """Of transformers' float32 network with the quantised layers in it, [B, T, V]."""
    from transformers import AutoModelForCausalLM

    model: Any = AutoModelForCausalLM.from_pretrained(original, dtype=torch.float32)
    for name, weight in layers.items():
        model.set_submodule(name, Quantised(weight, model.get_submodule(name).bias, halves))
    with torch.no_grad():
        logits: Tensor = model(ids).logits
    return logits


def relative_error(found: Tensor, wanted: Tensor) -> float:
    return float((found.float() - wanted.float()).norm() / wanted.float().norm())
