"""AutoAWQ, layout "gemm" (github.com/casper-hansen/AutoAWQ, `awq/modules/linear/gemm.py`).

qweight  int32 [K, O / 8]    eight outputs a word; from the lowest nibble up, outputs 0, 2, 4, 6, 1, 3, 5, 7
qzeros   int32 [G, O / 8]    in the same order
scales   float16 [G, O]      w[o, k] = scales[g, o] · (q[k, o] − zero[g, o])
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor

from server.quant.foreign.base import ForeignCheckpointError, Parts, RawTensors, integer_weight, pack_nibbles, unpack
from server.quant.formats import QuantizedWeight

ORDER = (0, 2, 4, 6, 1, 3, 5, 7)
"""The output that each nibble of a word holds, from the lowest up."""
_NIBBLE_OF = tuple(ORDER.index(output) for output in range(8))


class AutoAwq:
    """Implements Dialect."""

    name = "AutoAWQ"
    notices: tuple[str, ...] = ()

    def __init__(self, config: Mapping[str, Any]) -> None:
        """Raises ForeignCheckpointError for other layouts than 4-bit "gemm"."""
        bits = config.get("bits", config.get("w_bit", 4))
        if bits != 4:
            raise ForeignCheckpointError(f"quantization_config: bits {bits!r} is not supported for AutoAWQ; 4 works")
        version = str(config.get("version") or config.get("format") or "gemm").lower()
        if version != "gemm":
            raise ForeignCheckpointError(
                f"quantization_config: version {version!r} is not supported for AutoAWQ; gemm works"
            )

    def weight(self, tensors: RawTensors, name: str) -> QuantizedWeight | None:
        """See Dialect."""
        parts = Parts(tensors, name)
        qweight = parts.get("qweight")
        if qweight is None:
            return None
        outputs = qweight.shape[1] * 8
        scales, qzeros = parts.need("scales"), parts.get("qzeros")
        if scales.dim() != 2 or scales.shape[1] != outputs:
            raise parts.error("scales", f"has shape {list(scales.shape)}, not [groups, {outputs}]")
        zeros = None
        if qzeros is not None:
            parts.shaped("qzeros", qzeros, (scales.shape[0], outputs // 8))
            zeros = _in_order(qzeros).t()
        values = pack_nibbles(_in_order(qweight).t())
        return integer_weight(parts, "scales", values, scales.t(), zeros, bits=4)


def _in_order(words: Tensor) -> Tensor:
    """int32 [R, O / 8] as uint8 [R, O], the outputs in order."""
    eights: Tensor = unpack(words, 4).unflatten(1, (-1, 8))
    return eights[:, :, _NIBBLE_OF].flatten(1)
