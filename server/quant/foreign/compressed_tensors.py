"""compressed-tensors, what llm-compressor writes (compressed-tensors 0.20, `compressors/`).

weight_packed      int32 [O, ⌈K · bits / 32⌉]    q + 2^(bits − 1), consecutive columns, lowest bits first
weight             int8 or float8_e4m3fn [O, K]  in place of it: q as it is
weight_scale       [O, G], [O, 1], or one
weight_zero_point  int8 as weight_scale, or packed along the rows: int32 [⌈O · bits / 32⌉, G]
weight_shape       int64 [2]                     beside weight_packed
weight_g_idx       int32 [K]                     the group of each column, only where they are out of order
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from server.quant.foreign.base import (
    DYNAMIC_NOTICE,
    ForeignCheckpointError,
    Parts,
    RawTensors,
    integer_weight,
    pack_nibbles,
    row_scales,
    unpack,
)
from server.quant.foreign.schemes import Scheme, SchemeError, matches, parse_schemes
from server.quant.formats import FP8, LinearFormat, QuantizedWeight


class CompressedTensors:
    """Implements Dialect."""

    name = "compressed-tensors"

    def __init__(self, config: Mapping[str, Any]) -> None:
        """Raises ForeignCheckpointError, naming the field."""
        try:
            self._schemes = parse_schemes(config)
        except SchemeError as error:
            raise ForeignCheckpointError(str(error)) from None
        self._ignore = tuple(str(name) for name in config.get("ignore") or ())
        notices = [DYNAMIC_NOTICE] if any(scheme.static for scheme in self._schemes) else []
        if config.get("kv_cache_scheme"):
            notices.append("kv_cache_scheme is not used: --kv-cache-dtype says what the KV cache stores")
        self.notices = tuple(notices)

    def weight(self, tensors: RawTensors, name: str) -> QuantizedWeight | None:
        """See Dialect."""
        parts = Parts(tensors, name)
        scheme = self._scheme(name)
        packed = parts.has("weight_packed")
        if scheme is None or not (packed or parts.has("weight")):
            return None
        if not packed and not parts.has("weight_scale") and parts.need("weight").dtype not in (torch.int8, FP8):
            return None  # an embedding, or a layer of a class that no target names
        if parts.has("weight_g_idx"):
            raise parts.error(
                "weight_g_idx",
                "columns are grouped out of order (actorder group); actorder weight or static works",
            )
        if scheme.kind == "fp8":
            return _float_weight(parts, scheme)
        values = _packed_values(parts, scheme.bits) if packed else _plain_values(parts, scheme.bits)
        scales = parts.need("weight_scale")
        rows = values.shape[0]
        grouped = scales.dim() == 2 and scales.shape[1] > 1
        scales = scales if grouped else row_scales(parts, "weight_scale", rows).unsqueeze(1)
        zeros = _zeros(parts, scheme.bits, rows, scales.shape[1])
        return integer_weight(
            parts, "weight_scale", values, scales, zeros, bits=scheme.bits, activations=scheme.activations
        )

    def _scheme(self, name: str) -> Scheme | None:
        """What is said of a layer: by its name, else by an expression, else by its class, as compressed-tensors."""
        if matches(name, "Linear", self._ignore):
            return None
        candidates = [(target, scheme) for scheme in self._schemes for target in scheme.targets]
        for wanted in (False, True):  # names and classes are compared before and after expressions
            for target, scheme in candidates:
                if target.startswith("re:") is wanted and target != "Linear" and matches(name, "", [target]):
                    return scheme
        return next((scheme for target, scheme in candidates if target == "Linear"), None)


def _float_weight(parts: Parts, scheme: Scheme) -> QuantizedWeight:
    values = parts.need("weight")
    if values.dtype != FP8:
        raise parts.error("weight", f"is {values.dtype}; float8_e4m3fn works")
    scales = row_scales(parts, "weight_scale", values.shape[0])
    return QuantizedWeight(LinearFormat("fp8", scheme.activations), values, scales)


def _packed_values(parts: Parts, bits: int) -> Tensor:
    """U in uint8, [O, K / 2] of 4 bits, [O, K] of 8."""
    words = parts.need("weight_packed")
    shape = parts.get("weight_shape")
    columns = words.shape[1] * 32 // bits if shape is None or shape.is_meta else int(shape[1])
    narrow = words.contiguous().view(torch.uint8)
    return narrow[:, : columns * bits // 8]


def _plain_values(parts: Parts, bits: int) -> Tensor:
    values = parts.need("weight")
    if values.dtype != torch.int8:
        raise parts.error("weight", f"is {values.dtype}; int8 works")
    return pack_nibbles((values + 8).view(torch.uint8)) if bits == 4 else values.view(torch.uint8) ^ 128


def _zeros(parts: Parts, bits: int, rows: int, groups: int) -> Tensor | None:
    """Unsigned, [O, G]."""
    stored = parts.get("weight_zero_point")
    if stored is None:
        return None
    if stored.dtype == torch.int32:
        return unpack(stored.t(), bits).t()[:rows]
    zeros = stored.to(torch.int16) + (1 << (bits - 1))
    return zeros.reshape(1, 1).expand(rows, groups) if zeros.numel() == 1 else zeros.reshape(rows, -1)
