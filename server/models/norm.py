"""Root-mean-square layer normalisation (Zhang and Sennrich 2019)."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor


class RMSNorm:
    """`y = x / sqrt(mean(x²) + eps) * weight` over the last axis of x [..., H].

    On a CPU in float32 as x / sqrt(|x|² + H eps) * (sqrt(H) weight): five operations instead of torch's eight, which is
    3 % of a decoding step of SmolLM2-135M; as close to the float64 result.
    """

    __slots__ = ("_addend", "_scaled", "eps", "weight")

    def __init__(self, weight: Tensor, eps: float) -> None:
        self.weight, self.eps = weight, eps
        size = weight.shape[0]
        plain = weight.device.type != "cpu" or weight.dtype != torch.float32
        self._scaled = None if plain else weight * size**0.5
        self._addend = torch.tensor(size * eps)

    def copy_weight(self) -> None:
        """For a norm without memory (on torch's `meta` device) that stands for one in float32 on a CPU."""
        self._scaled = torch.empty_like(self.weight)

    def __call__(self, x: Tensor) -> Tensor:
        if self._scaled is None:
            return F.rms_norm(x, self.weight.shape, self.weight, self.eps)
        length = torch.linalg.vector_norm(x, dim=-1, keepdim=True)
        return (x * torch.addcmul(self._addend, length, length).rsqrt_()).mul_(self._scaled)
