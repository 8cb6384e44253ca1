"""NVIDIA Model Optimizer's unified Hugging Face export (`modelopt.torch.export`, 0.47).

weight           float8_e4m3fn [O, K], int8 [O, K], or of 4 bits uint8 [O / 2, K]: signed, row 2i in the low nibble
weight_scale     one, [O], or [O, K / group_size]
pre_quant_scale  [K]: what the activations are multiplied by first
input_scale      one, of the activations: not used
"""

from __future__ import annotations

import fnmatch
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from server.quant.foreign.base import (
    DYNAMIC_NOTICE,
    ForeignCheckpointError,
    Parts,
    RawTensors,
    group_size_of,
    pack_nibbles,
    row_scales,
)
from server.quant.formats import FP8, ActivationKind, LinearFormat, QuantizedWeight

FILE = "hf_quant_config.json"
_ALGORITHMS: dict[str, tuple[torch.dtype, ActivationKind]] = {
    "FP8": (FP8, "fp8"),
    "FP8_PER_CHANNEL_PER_TOKEN": (FP8, "fp8"),
    "W8A16": (torch.int8, "none"),
    "W8A8_SQ_PER_CHANNEL": (torch.int8, "int8"),
    "W4A16_AWQ": (torch.uint8, "none"),
}
_STATIC = ("FP8", "W8A8_SQ_PER_CHANNEL")


class ModelOpt:
    """Implements Dialect. `quantization_config` in `config.json` is flat, `hf_quant_config.json` nested and older."""

    name = "ModelOpt"

    def __init__(self, config: Mapping[str, Any]) -> None:
        """Raises ForeignCheckpointError for algorithms that cannot be represented."""
        inner = config.get("quantization", config)
        self._algorithm = inner.get("quant_algo")
        self._layers = {str(k): v.get("quant_algo") for k, v in (inner.get("quantized_layers") or {}).items()}
        self._excluded = [str(p) for p in inner.get("exclude_modules") or inner.get("ignore") or ()]
        used = set(self._layers.values()) if self._algorithm == "MIXED_PRECISION" else {self._algorithm}
        for algorithm in used:
            if algorithm not in _ALGORITHMS:
                raise ForeignCheckpointError(
                    f"quantization_config: quant_algo {algorithm!r} of ModelOpt is not supported; "
                    f"{', '.join(_ALGORITHMS)} work"
                )
        notices = [DYNAMIC_NOTICE] if used & set(_STATIC) else []
        if inner.get("kv_cache_quant_algo") or inner.get("kv_cache_scheme"):
            notices.append("the KV cache's scales are not used: --kv-cache-dtype says what it stores")
        self.notices = tuple(notices)

    def weight(self, tensors: RawTensors, name: str) -> QuantizedWeight | None:
        """See Dialect."""
        parts = Parts(tensors, name)
        algorithm = self._layers.get(name) if self._algorithm == "MIXED_PRECISION" else self._algorithm
        if algorithm is None or not parts.has("weight") or self._is_excluded(name):
            return None
        values = parts.need("weight")
        dtype, activations = _ALGORITHMS[algorithm]
        if values.dtype != dtype:
            if parts.has("weight_scale"):
                raise parts.error("weight", f"is {values.dtype}; {dtype} works for {algorithm}")
            return None  # what no pattern excludes and modelopt does not quantise, such as an embedding
        factors = parts.get("pre_quant_scale")
        smooth = factors is not None
        if values.dtype == torch.uint8:
            packed = _packed(values)
            scales = parts.need("weight_scale")
            if scales.dim() != 2 or scales.shape[0] != packed.shape[0]:
                raise parts.error("weight_scale", f"has shape {list(scales.shape)}, not [{packed.shape[0]}, groups]")
            group = group_size_of(parts, "weight_scale", scales, values.shape[1])
            stored = scales.squeeze(1) if group is None else scales
            return QuantizedWeight(LinearFormat("int4", "none", group, smooth=smooth), packed, stored, None, factors)
        scales = row_scales(parts, "weight_scale", values.shape[0])
        form = LinearFormat("fp8" if dtype == FP8 else "int8", activations, smooth=smooth)
        return QuantizedWeight(form, values, scales, None, factors)

    def _is_excluded(self, name: str) -> bool:
        return any(fnmatch.fnmatchcase(name, pattern) for pattern in self._excluded)


def read_file(directory: Path) -> dict[str, Any] | None:
    """The content of `hf_quant_config.json`, None if there is none. Raises ForeignCheckpointError if it is damaged."""
    path = directory / FILE
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (FileNotFoundError, NotADirectoryError):
        return None
    except (OSError, ValueError) as error:
        raise ForeignCheckpointError(f"{path}: cannot be read as JSON: {error}") from error
    if not isinstance(content, dict):
        raise ForeignCheckpointError(f"{path}: is not a JSON object")
    return content


def _packed(values: Tensor) -> Tensor:
    """uint8 [O / 2, K], two rows a byte, signed, as ours [O, K / 2]."""
    rows = torch.stack([values & 15, values >> 4], dim=1).flatten(0, 1)
    return pack_nibbles(rows ^ 8)  # two's complement to 0 … 15 around 8
