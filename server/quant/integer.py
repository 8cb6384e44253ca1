"""Products of 8-bit integers on a CPU, by oneDNN, with one scale for each row of the weight.

The weight is packed once as int8 (a byte each, whatever its width in the file). Activations come as unsigned bytes with
zero point 128. Sums are whole numbers, so a row's result is the same bits however many rows there are, one included.

Activations of 8 bits (W8A8) are one such product. Float activations (weight-only) are three: a row is brought to a
fixed point of 23 bits below its largest magnitude, by a power of two, and its three bytes are three rows of the
product. What that rounds off is 2⁻²³ of the row's largest number, which float32 sums lose as well: activations are not
reduced to bfloat16. Measured on a core with AVX-512 VNNI, 4096 x 4096, weights not in the cache, at 1 / 4 / 8 rows:
1.1 / 1.2 / 1.6 ms with 8-bit activations, float32 packed 3.5 / 3.6 / 4.5; at 64 rows three products cost as much as
float32. (Of torch's other operators `_int_mm` packs the weight again at each call of several rows, 6 ms, and
`_weight_int8pack_mm` takes ten times as long as float32 unless activations are bfloat16.)

Without VNNI instructions oneDNN adds pairs of products in 16 bits and saturates; `available` finds that out by trying,
and other kernels are taken there.
"""

from __future__ import annotations

from functools import cache

import torch
from torch import Tensor

from server.quant.formats import LinearFormat, QuantizedWeight, quantize_activations

_BITS = 22
_BIAS = 0x808080  # of three bytes with zero point 128 each
_SMALLEST_EXPONENT = -100  # below it factors leave float32; such a row is rounded more coarsely
_EXACT_COLUMNS = 1 << 17
"""Sums of so many products of 8 bits fit 32."""


@cache
def available() -> bool:
    """Whether this torch has the operators and this processor computes them exactly."""
    if not (torch.backends.mkldnn.is_available() and hasattr(torch.ops.onednn, "qlinear_pointwise")):
        return False
    rows = torch.tensor([[255] * 64, [0] * 64, [255, 0] * 32], dtype=torch.uint8)
    weight = torch.tensor([[127] * 64, [-127] * 64, [127, -128] * 32] * 8, dtype=torch.int8)
    try:
        found = _product(rows, torch.ops.onednn.qlinear_prepack(weight, None), torch.ones(len(weight)))
    except RuntimeError:  # no kernel on this kind of processor
        return False
    return torch.equal(found.long(), (rows.long() - 128) @ weight.long().t())


def why_not(weight: QuantizedWeight) -> str | None:
    """Why this kernel cannot take a weight; None if it can."""
    if weight.device.type != "cpu":
        return "it is not on a CPU"
    if not fits(weight.format, weight.shape[1]):
        return f"format {weight.format.name} is not of whole numbers with a scale for each row, and exact sums"
    return None if available() else "this processor has no exact sums of products of 8-bit numbers"


def fits(form: LinearFormat, columns: int) -> bool:
    """Whether the format of a weight of so many columns is one of this kernel."""
    whole = form.weights != "fp8" and form.group_size is None and not form.minimum
    return whole and form.activations in ("none", "int8") and 0 < columns < _EXACT_COLUMNS


class IntegerLinear:
    """`y = x Wᵀ + b` for x [N, K]; implements server.quant.layer.LinearLayer.

    Raises ValueError where `why_not` has a reason.
    """

    __slots__ = (
        "_input_scales",
        "_packed",
        "_scales",
        "_whole",
        "bias",
        "format",
        "in_features",
        "out_features",
        "path",
    )

    def __init__(self, weight: QuantizedWeight, bias: Tensor | None = None) -> None:
        reason = why_not(weight)
        if reason is not None:
            raise ValueError(reason)
        self.out_features, self.in_features = weight.shape
        values = weight.values if weight.format.weights == "int8" else weight.numbers().to(torch.int8)
        self._packed: Tensor = torch.ops.onednn.qlinear_prepack(values.contiguous(), None)
        self._scales = weight.scales.float().contiguous()
        self._input_scales = None if weight.input_scales is None else weight.input_scales.float()
        self._whole = weight.format.activations == "int8"
        self.bias, self.format = bias, weight.format.name
        self.path = "onednn-int8" if self._whole else "onednn-int8x3"

    def __call__(self, x: Tensor) -> Tensor:
        inputs = x.float() if self._input_scales is None else x.float() * self._input_scales
        if len(x) == 0:
            return x.new_empty(0, self.out_features)
        result = self._of_bytes(inputs) if self._whole else self._of_floats(inputs)
        if self.bias is not None:
            result += self.bias
        return result.to(x.dtype)

    def _of_bytes(self, x: Tensor) -> Tensor:
        q, scales = quantize_activations(x, "int8")
        return _product(q.view(torch.uint8).bitwise_xor_(128), self._packed, self._scales).mul_(scales)

    def _of_floats(self, x: Tensor) -> Tensor:
        limbs, factors = split(x)
        high, middle, low = _product(limbs.flatten(0, 1), self._packed, self._scales).chunk(3)
        # Powers of two: no multiplication here rounds.
        return low.add_(middle, alpha=1 << 8).add_(high, alpha=1 << 16).mul_(factors)

    def plain_weight(self) -> Tensor:
        """W [O, K] in float32, a copy."""
        weight = self._packed.to_dense().t().float() * self._scales[:, None]
        return weight if self._input_scales is None else weight * self._input_scales


def split(x: Tensor) -> tuple[Tensor, Tensor]:
    """Of x [N, K] float32: (bytes [3, N, K] uint8, factors [N, 1] float32).

    x is factors * (65536 h + 256 m + l), each byte less 128, up to half a factor; a factor is at most 2⁻²¹ of the row's
    largest magnitude. A row that is not finite gets NaN.
    """
    largest = x.abs().amax(1, keepdim=True)
    exponents = torch.frexp(largest).exponent.clamp_(min=_SMALLEST_EXPONENT)
    one = torch.ones_like(largest)
    fixed = (x * torch.ldexp(one, _BITS - exponents)).round_().to(torch.int32) + _BIAS
    limbs = fixed.view(torch.uint8).unflatten(1, (-1, 4))[..., :3]
    factors = torch.ldexp(one, exponents - _BITS).where(largest.isfinite(), torch.nan)
    return limbs.permute(2, 0, 1).flip(0).contiguous(), factors


def _product(rows: Tensor, packed: Tensor, scales: Tensor) -> Tensor:
    """Float32 [N, O] of rows [N, K] uint8 less 128: sums rounded once to float32, times scales [O]."""
    zero = torch.zeros(len(scales), dtype=torch.int32)
    out: Tensor = torch.ops.onednn.qlinear_pointwise.default(
        rows, 1.0, 128, packed, scales, zero, None, 1.0, 0, torch.float32, "none", [], ""
    )
    return out
