"""Weights rounded to nearest, and model directories of them."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from server.quant.checkpoint import INPUT_SCALES, MINIMUMS, SCALES, VALUES, quantization_config
from server.quant.formats import FP8, LinearFormat, QuantizedWeight

Choose = Callable[[str], LinearFormat | None]


def rounded(weight: Tensor, form: LinearFormat, scale_dtype: torch.dtype = torch.float16) -> QuantizedWeight:
    """W [O, K] to nearest in `form`; factors of a smooth format are between a half and 2."""
    rows, columns = weight.shape
    smooth = torch.linspace(0.5, 2.0, columns) if form.smooth else None
    weight = weight.float() if smooth is None else weight.float() / smooth
    grouped = weight.view(rows, -1, form.group_size or columns)
    low, high = grouped.amin(-1, keepdim=True), grouped.amax(-1, keepdim=True)
    limit = {"fp8": 448.0, "int8": 127.0, "int4": 7.0}[form.weights]
    if form.minimum:
        low = low.to(scale_dtype).float()
        step = (high - low) / (15.0 if form.weights == "int4" else 127.0)
    else:
        step = torch.maximum(high, -low) / limit
    step = step.to(scale_dtype).float().clamp(min=1e-6)
    q = (grouped - (low if form.minimum else 0.0)) / step
    if form.weights == "fp8":
        values = q.clamp(-448, 448).reshape(rows, columns).to(FP8)
    elif form.weights == "int8":
        values = q.round().clamp(-127, 127).reshape(rows, columns).to(torch.int8)
    else:
        whole = (q if form.minimum else q + 8).round().clamp(0, 15).reshape(rows, columns).to(torch.uint8)
        values = whole[:, ::2] | (whole[:, 1::2] << 4)
    shape = (rows,) if form.group_size is None else (rows, columns // form.group_size)
    minimums = low.view(shape).to(scale_dtype) if form.minimum else None
    return QuantizedWeight(form, values, step.view(shape).to(scale_dtype), minimums, smooth)


def write_quantized(source: Path, target: Path, choose: Choose) -> Path:
    """The model of directory `source` with each matrix of which `choose` names a format rounded to it."""
    shutil.copytree(source, target)
    tensors = {k: v for file in sorted(source.glob("*.safetensors")) for k, v in load_file(file).items()}
    for file in target.glob("*.safetensors"):
        file.unlink()
    layers = {}
    for name in [n for n in tensors if n.endswith(".weight")]:
        layer = name.removesuffix(".weight")
        form = choose(layer) if tensors[name].dim() == 2 else None
        if form is None:
            continue
        made = rounded(tensors.pop(name), form)
        parts = {VALUES: made.values, SCALES: made.scales, MINIMUMS: made.minimums, INPUT_SCALES: made.input_scales}
        tensors |= {f"{layer}.{part}": t for part, t in parts.items() if t is not None}
        layers[layer] = asdict(form)
    save_file(tensors, target / "model.safetensors")
    config = json.loads((target / "config.json").read_text())
    (target / "config.json").write_text(json.dumps({**config, "quantization_config": quantization_config(layers)}))
    return target
