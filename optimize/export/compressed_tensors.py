"""compressed-tensors: what vLLM, SGLang and transformers load (layout: server/quant/foreign/compressed_tensors.py).

Integers are packed where activations stay in 16 bits, or are of 4 bits; int8 beside int8 activations is stored plainly,
as vLLM's loader wants it.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from optimize.export.format import Settings, words
from optimize.export.zero_points import zero_points
from server.quant.formats import LinearFormat, QuantizedWeight


class CompressedTensorsFormat:
    """Implements Format."""

    name = "compressed-tensors"

    def prepare(self, weight: QuantizedWeight) -> QuantizedWeight:
        """See Format."""
        return weight

    def problem(self, layer: str, weight: QuantizedWeight) -> str | None:
        """See Format."""
        form = weight.format
        if layer.endswith("embed_tokens"):
            return "engines read embeddings in 16 bits only"
        if form.smooth:
            return "it has no place for factors of a layer's activations, and these cannot move into the layer before"
        if form.weights == "fp8" and (form.group_size or form.activations not in ("none", "fp8")):
            return f"it has no scheme {form.name}"
        if form.weights != "fp8" and form.activations == "fp8":
            return f"no engine runs its scheme for {form.name}"
        if form.minimum and zero_points(weight) is None:
            return "its zero points are whole numbers, and the minimums of this layer are not multiples of its scales"
        return None

    def tensors(self, layer: str, weight: QuantizedWeight) -> dict[str, Tensor]:
        """See Format."""
        rows, columns = weight.shape
        scales = weight.scales if weight.scales.dim() == 2 else weight.scales.unsqueeze(1)
        if _stored_as(weight.format) != "pack-quantized":
            return {f"{layer}.weight": weight.values, f"{layer}.weight_scale": scales.float()} | _plain_zeros(
                layer, weight
            )
        unsigned = weight.values if weight.format.weights == "int4" else weight.values.view(torch.uint8) ^ 128
        packed = words(unsigned)
        found = {
            f"{layer}.weight_packed": packed,
            f"{layer}.weight_scale": scales,
            f"{layer}.weight_shape": torch.tensor([rows, columns]),
        }
        if weight.format.minimum:
            found[f"{layer}.weight_zero_point"] = _packed_zeros(weight)
        return found

    def settings(self, layers: Mapping[str, LinearFormat], others: list[str]) -> Settings:
        """See Format."""
        schemes: dict[LinearFormat, list[str]] = {}
        for layer, form in layers.items():
            schemes.setdefault(replace(form, smooth=False), []).append(layer)
        stored = {_stored_as(form) for form in schemes}
        groups = {
            f"group_{i}": {
                "targets": ["Linear"] if len(schemes) == 1 else names,
                "weights": _weights(form),
                "input_activations": _activations(form),
                "output_activations": None,
                "format": _stored_as(form),
            }
            for i, (form, names) in enumerate(schemes.items())
        }
        config = {
            "quant_method": "compressed-tensors",
            "format": stored.pop() if len(stored) == 1 else "mixed-precision",
            "quantization_status": "compressed",
            "config_groups": groups,
            "ignore": others,
            "kv_cache_scheme": None,
            "global_compression_ratio": None,
        }
        return Settings(config)


def _stored_as(form: LinearFormat) -> str:
    if form.weights == "fp8":
        return "float-quantized" if form.activations == "fp8" else "naive-quantized"
    return "int-quantized" if form.weights == "int8" and form.activations == "int8" else "pack-quantized"


def _weights(form: LinearFormat) -> dict[str, Any]:
    return {
        "num_bits": form.bits,
        "type": "float" if form.weights == "fp8" else "int",
        "symmetric": not form.minimum,
        "strategy": "group" if form.group_size else "channel",
        "group_size": form.group_size,
        "dynamic": False,
    }


def _activations(form: LinearFormat) -> dict[str, Any] | None:
    if form.activations == "none":
        return None
    grouped = form.activations == "int8-group"
    return {
        "num_bits": 8,
        "type": "float" if form.activations == "fp8" else "int",
        "symmetric": True,
        "strategy": "group" if grouped else "token",
        "group_size": form.group_size if grouped else None,
        "dynamic": True,
    }


def _zeros(weight: QuantizedWeight) -> Tensor:
    zeros = zero_points(weight)
    assert zeros is not None  # `problem` has asked
    return zeros if zeros.dim() == 2 else zeros.unsqueeze(1)


def _packed_zeros(weight: QuantizedWeight) -> Tensor:
    """int32 [⌈O · bits / 32⌉, G], consecutive rows a word."""
    by_group = _zeros(weight).t().to(torch.int16)
    if weight.format.weights == "int8":
        return words((by_group + 128).to(torch.uint8)).t().contiguous()
    nibbles = F.pad(by_group, (0, by_group.shape[1] % 2)).to(torch.uint8)
    return words(nibbles[:, 0::2] | (nibbles[:, 1::2] << 4)).t().contiguous()


def _plain_zeros(layer: str, weight: QuantizedWeight) -> dict[str, Tensor]:
    return {f"{layer}.weight_zero_point": _zeros(weight).to(torch.int8)} if weight.format.minimum else {}
