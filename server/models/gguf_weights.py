"""Raw GGUF blocks as `QuantizedWeight`."""

from __future__ import annotations

import torch
from torch import Tensor

from server.models.gguf_convert import RawBlocks
from server.models.gguf_native import Array, layout, pack
from server.quant.formats import ActivationKind, LinearFormat, QuantizedWeight


def quantized_weight(raw: RawBlocks, activations: ActivationKind = "none") -> QuantizedWeight | None:
    """The weight [O, K] in the order of its Hugging Face rows, on the CPU; None where no format holds the type.

    `dequantize()` of it equals gguf's dequantisation bit for bit in float32.
    """
    kept = layout(raw.type_name)
    if kept is None or len(raw.shape) != 2:
        return None
    packed = pack(raw.data if raw.row_order is None else raw.data[raw.row_order], raw.type_name)
    return QuantizedWeight(
        format=LinearFormat(**kept.fields(activations)),
        values=_tensor(packed.values),
        scales=_tensor(packed.scales),
        minimums=None if packed.minimums is None else _tensor(packed.minimums),
    )


def _tensor(array: Array) -> Tensor:
    # Blocks may be mapped read-only and pass through unchanged (a row order of its own copies them anyway).
    return torch.from_numpy(array if array.flags.writeable else array.copy())
