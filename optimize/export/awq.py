"""AutoAWQ, layout "gemm" (server/quant/foreign/awq.py): 4 bits, whole zero points, one group size for all layers."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

import torch
from torch import Tensor

from optimize.export.format import Settings, common_group_size, regroup, words
from optimize.export.zero_points import zero_points
from server.quant.formats import LinearFormat, QuantizedWeight

_ORDER = (0, 2, 4, 6, 1, 3, 5, 7)
_SMALLEST_HALF, _LARGEST_HALF = 2.0**-14, 65504.0


class AwqFormat:
    """Implements Format. `forms` are those of all layers."""

    name = "awq"

    def __init__(self, forms: Iterable[LinearFormat]) -> None:
        self._size = common_group_size(forms)

    def prepare(self, weight: QuantizedWeight) -> QuantizedWeight:
        """See Format."""
        return regroup(weight, self._size) if weight.format.weights == "int4" else weight

    def problem(self, layer: str, weight: QuantizedWeight) -> str | None:
        """See Format."""
        form, scales = weight.format, weight.scales.float().abs()
        if layer.endswith(("embed_tokens", "lm_head")):
            return "it leaves the embedding and the output layer in 16 bits"
        if form.weights != "int4" or form.activations != "none":
            return f"it has 4-bit weights and activations in 16 bits only, not {form.name}"
        if form.smooth:
            return "it has no place for factors of a layer's activations, and these cannot move into the layer before"
        if form.group_size is None or form.group_size != self._size:
            return "it has one group size for all layers"
        if weight.shape[0] % 8:
            return f"it packs eight outputs a word, and this layer has {weight.shape[0]}"
        if zero_points(weight) is None:
            return "its zero points are whole numbers, and the minimums of this layer are not multiples of its scales"
        used = scales[scales > 0]
        if used.numel() and (float(used.min()) < _SMALLEST_HALF or float(used.max()) > _LARGEST_HALF):
            return "its scales are float16, which does not hold those of this layer"
        return None

    def tensors(self, layer: str, weight: QuantizedWeight) -> dict[str, Tensor]:
        """See Format."""
        zeros = zero_points(weight)
        assert zeros is not None  # `problem` has asked
        numbers = torch.stack([weight.values & 15, weight.values >> 4], dim=-1).flatten(1)
        return {
            f"{layer}.qweight": _words(numbers.t()),
            f"{layer}.qzeros": _words(zeros.t().to(torch.uint8)),
            f"{layer}.scales": weight.scales.t().half().contiguous(),
        }

    def settings(self, layers: Mapping[str, LinearFormat], others: list[str]) -> Settings:
        """See Format."""
        return Settings(
            {
                "quant_method": "awq",
                "version": "gemm",
                "bits": 4,
                "group_size": self._size,
                "zero_point": True,
                "modules_to_not_convert": others or None,
            }
        )


def _words(numbers: Tensor) -> Tensor:
    """0 … 15 [R, O] as int32 [R, O / 8]."""
    nibbles = numbers.unflatten(1, (-1, 8))[:, :, _ORDER].flatten(1)
    return words(nibbles[:, 0::2] | (nibbles[:, 1::2] << 4))
