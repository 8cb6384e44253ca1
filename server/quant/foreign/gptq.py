"""GPTQ as AutoGPTQ and GPTQModel store it (github.com/ModelCloud/GPTQModel, `nn_modules/qlinear`).

qweight  int32 [K · bits / 32, O]    consecutive inputs a word, lowest bits first
qzeros   int32 [G, O · bits / 32]    consecutive outputs; of checkpoint format "gptq" (v1) one less than the zero
scales   float16 [G, O]              w[o, k] = scales[g_idx[k], o] · (q[k, o] − zero[g_idx[k], o])
g_idx    int32 [K]                   the group of each input
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from server.quant.foreign.base import ForeignCheckpointError, Parts, RawTensors, integer_weight, unpack
from server.quant.formats import QuantizedWeight

_FORMATS = {"gptq": 1, "gptq_v2": 0}
"""What is added to a stored zero point."""


class Gptq:
    """Implements Dialect. Bits of a layer follow from its shapes, so overrides a layer (`dynamic`) need no reading."""

    name = "GPTQ"
    notices: tuple[str, ...] = ()

    def __init__(self, config: Mapping[str, Any]) -> None:
        """Raises ForeignCheckpointError for bits and checkpoint formats that cannot be represented."""
        self._bits = config.get("bits", 4)
        if self._bits not in (4, 8):
            raise ForeignCheckpointError(
                f"quantization_config: bits {self._bits!r} is not supported for GPTQ; 4 and 8 work"
            )
        stored = str(config.get("checkpoint_format") or config.get("format") or "gptq").lower()
        if stored not in _FORMATS:
            raise ForeignCheckpointError(
                f"quantization_config: checkpoint_format {stored!r} is not supported for GPTQ; "
                f"{' and '.join(_FORMATS)} work"
            )
        self._offset = _FORMATS[stored]

    def weight(self, tensors: RawTensors, name: str) -> QuantizedWeight | None:
        """See Dialect."""
        parts = Parts(tensors, name)
        qweight = parts.get("qweight")
        if qweight is None:
            return None
        scales, g_idx = parts.need("scales"), parts.get("g_idx")
        bits = self._bits if g_idx is None else 32 * qweight.shape[0] // len(g_idx)
        if bits not in (4, 8):
            raise parts.error("qweight", f"holds {bits}-bit integers; 4 and 8 bits work")
        columns, outputs = qweight.shape[0] * 32 // bits, qweight.shape[1]
        if scales.dim() != 2 or scales.shape[1] != outputs:
            raise parts.error("scales", f"has shape {list(scales.shape)}, not [groups, {outputs}]")
        if g_idx is not None:
            _check_order(parts, g_idx, columns, scales.shape[0])
        values = qweight.t().contiguous().view(torch.uint8)  # 4-bit integers are packed as ours are
        zeros = self._zeros(parts, bits, tuple(scales.shape))
        return integer_weight(parts, "scales", values, scales.t(), zeros, bits=bits)

    def _zeros(self, parts: Parts, bits: int, shape: tuple[int, ...]) -> Tensor:
        """[O, G]."""
        qzeros = parts.need("qzeros")
        zeros = unpack(parts.shaped("qzeros", qzeros, (shape[0], shape[1] * bits // 32)), bits).t()
        if self._offset and not zeros.is_meta and bool((zeros == (1 << bits) - 1).any()):
            raise parts.error(
                "qzeros",
                f"holds a zero point of {(1 << bits) - 1} in checkpoint format gptq, which its readers take for "
                f"{1 << bits} or for 0; a checkpoint saved as gptq_v2 works",
            )
        return zeros + self._offset


def _check_order(parts: Parts, g_idx: Tensor, columns: int, groups: int) -> None:
    if groups == 0 or columns % groups:
        raise parts.error("scales", f"has {groups} groups, which do not divide {columns} columns")
    parts.shaped("g_idx", g_idx, (columns,))
    wanted = torch.arange(columns, device=g_idx.device) // (columns // groups)
    if not g_idx.is_meta and not torch.equal(g_idx.long(), wanted):
        raise parts.error(
            "g_idx",
            "groups columns in another order than they are stored (desc_act, act-order), which the kernels cannot "
            "follow; a checkpoint made with desc_act=False works",
        )
