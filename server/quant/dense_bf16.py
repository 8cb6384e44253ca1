"""Linear layers with bfloat16 weights for float32 activations, on CPUs whose vector units multiply bfloat16.

A drafter at batch 1 costs what its weights cost to read, and these are half as long; published EAGLE-3 heads are stored
in bfloat16 anyway. Inputs and results are rounded to bfloat16, sums are float32: what a GPU computes in bfloat16. Not
for a target: which bits a row gets depends on how many rows there are.

Measured on two cores with AVX-512 BF16, one row, in microseconds, float32 packed and this: [12288, 576] 560 and 125,
[3072, 576] 108 and 46, [960, 1152] 77 and 35.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from server.quant.dense import PACK_HINT_ROWS, packing_available


class Bf16Linear:
    """`y = x Wᵀ` for x [N, K] and W [O, K], both float32 on the CPU; W is rounded once."""

    __slots__ = ("_weight", "in_features", "out_features", "path")

    def __init__(self, weight: Tensor) -> None:
        self.out_features, self.in_features = weight.shape
        reorder: Callable[[Tensor, int], Tensor] = torch.ops.mkldnn._reorder_linear_weight
        rounded = weight.to(torch.bfloat16).contiguous()
        self._weight = rounded if rounded.is_meta else reorder(rounded, PACK_HINT_ROWS)  # a sketch is not packed
        self.path = "onednn-packed-bf16"

    def __call__(self, x: Tensor) -> Tensor:
        out: Tensor = torch.ops.mkldnn._linear_pointwise.default(
            x.to(torch.bfloat16), self._weight, None, "none", [], ""
        )
        return out.to(x.dtype)


def bf16_pays() -> bool:
    """Whether this CPU multiplies bfloat16 by itself, and this torch has the packed operators.

    Where it has to be emulated, float32 is quicker.
    """
    tests = (getattr(torch.cpu, name, None) for name in ("_is_avx512_bf16_supported", "_is_amx_tile_supported"))
    return packing_available() and any(test is not None and bool(test()) for test in tests)
