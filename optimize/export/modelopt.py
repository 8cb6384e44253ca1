"""ModelOpt's unified directory, for TensorRT-LLM, and for vLLM in FP8 (layout: server/quant/foreign/modelopt.py)."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from optimize.export.format import Settings, common_group_size, regroup
from server.quant.formats import LinearFormat, QuantizedWeight

_PRODUCER = {"name": "modelopt", "version": "0.47.0"}
"""Whose layout it is: readers look for the name."""
_ALGORITHMS = {"fp8+fp8": "FP8_PER_CHANNEL_PER_TOKEN", "int8": "W8A16"}
_WANTS_FACTORS = re.compile(r".*\.(self_attn\.o_proj|mlp\.down_proj)")


class ModelOptFormat:
    """Implements Format. `forms` are those of all layers, `dtype` that of factors of the activations."""

    name = "modelopt"

    def __init__(self, forms: Iterable[LinearFormat], dtype: torch.dtype) -> None:
        self._size, self._dtype = common_group_size(forms), dtype

    def prepare(self, weight: QuantizedWeight) -> QuantizedWeight:
        """See Format."""
        return regroup(weight, self._size) if weight.format.weights == "int4" else weight

    def problem(self, layer: str, weight: QuantizedWeight) -> str | None:
        """See Format."""
        form = weight.format
        if layer.endswith("embed_tokens"):
            return "engines read embeddings in 16 bits only"
        if form.minimum:
            return "it has no zero points"
        if form.weights == "int8" and form.activations == "int8":
            return "its INT8 activations have one fixed scale a tensor, not one a token"
        if form.weights == "int4" and form.activations == "int8":
            return "its 8-bit activations beside 4-bit weights are FP8"
        algorithm = _algorithm(form)
        if algorithm is None:
            return f"it has no layout for {form.name}"
        if form.smooth and (algorithm != "W4A16_AWQ" or not _WANTS_FACTORS.fullmatch(layer)):
            return "engines read no factors of this layer's activations, and these cannot move into the layer before"
        if algorithm == "W4A16_AWQ" and weight.shape[0] % 2:
            return f"it packs two outputs a byte, and this layer has {weight.shape[0]}"
        return None

    def tensors(self, layer: str, weight: QuantizedWeight) -> dict[str, Tensor]:
        """See Format. TensorRT-LLM wants factors of every `o_proj` and `down_proj`, so some are 1."""
        found = {f"{layer}.weight": weight.values, f"{layer}.weight_scale": weight.scales.float()}
        if weight.format.weights != "int4":
            return found
        numbers = torch.stack([weight.values & 15, weight.values >> 4], dim=-1).flatten(1) ^ 8
        found[f"{layer}.weight"] = numbers[0::2] | (numbers[1::2] << 4)
        if weight.input_scales is not None:
            found[f"{layer}.pre_quant_scale"] = weight.input_scales.to(self._dtype)
        elif _WANTS_FACTORS.fullmatch(layer):
            found[f"{layer}.pre_quant_scale"] = torch.ones(weight.shape[1], dtype=self._dtype)
        return found

    def settings(self, layers: Mapping[str, LinearFormat], others: list[str]) -> Settings:
        """See Format."""
        each = {layer: _fields(form) for layer, form in layers.items()}
        kinds = {fields["quant_algo"] for fields in each.values()}
        shared: dict[str, Any] = {"quant_algo": "MIXED_PRECISION", "quantized_layers": each}
        if len(kinds) == 1:
            shared = dict(next(iter(each.values())))
        excluded = [*others, "model.embed_tokens"]
        nested = {**shared, "kv_cache_quant_algo": None, "exclude_modules": excluded}
        flat = {"quant_method": "modelopt", **shared, "ignore": excluded, "producer": _PRODUCER}
        return Settings(flat, {"hf_quant_config.json": {"producer": _PRODUCER, "quantization": nested}})


def _algorithm(form: LinearFormat) -> str | None:
    if form.weights == "int4" and form.activations == "none" and form.group_size:
        return "W4A16_AWQ"
    return _ALGORITHMS.get(replace(form, smooth=False).name)


def _fields(form: LinearFormat) -> dict[str, Any]:
    algorithm = _algorithm(form)
    if algorithm != "W4A16_AWQ":
        return {"quant_algo": algorithm}
    return {
        "quant_algo": algorithm,
        "group_size": form.group_size,
        "has_zero_point": False,
        "pre_quant_scale": True,
    }
