"""Rotary position embedding (Su et al. 2021, RoFormer, section 3.4) with Hugging Face's scaling variants.

Pairs are stored side by side (2i, 2i+1) rather than as halves: the loader permutes the rows of the query and key
projections once, scores do not change, and the rotation becomes one in-place complex product for queries and keys
together.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from server.models.config import RopeConfig, UnsupportedModelError


def inverse_frequencies(rope: RopeConfig, head_dim: int, max_positions: int) -> tuple[Tensor, float]:
    """([head_dim / 2] inverse frequencies, factor on cos and sin) for rope types default, linear, llama3, yarn."""
    exponents = torch.arange(0, head_dim, 2, dtype=torch.int64).float() / head_dim
    base = 1.0 / (rope.theta**exponents)
    kind = rope.scaling.get("rope_type", "default")
    if kind == "default":
        return base, 1.0
    factor = float(rope.scaling.get("factor", 1.0))
    if kind == "linear":
        return base / factor, 1.0
    if kind == "llama3":
        return _llama3(base, rope.scaling, factor), 1.0
    if kind == "yarn":
        return _yarn(rope, head_dim, max_positions, factor)
    raise UnsupportedModelError(f"rope type {kind!r} is not supported; supported: default, linear, llama3, yarn")


def _llama3(base: Tensor, scaling: dict[str, float], factor: float) -> Tensor:
    low, high = float(scaling["low_freq_factor"]), float(scaling["high_freq_factor"])
    original = float(scaling["original_max_position_embeddings"])
    wavelength = 2 * math.pi / base
    smooth = ((original / wavelength - low) / (high - low)).clamp(0.0, 1.0)
    return (1 - smooth) * base / factor + smooth * base


def _yarn(rope: RopeConfig, head_dim: int, max_positions: int, factor: float) -> tuple[Tensor, float]:
    """YaRN (Peng et al. 2023, section 3): blends interpolated and extrapolated frequencies by wavelength."""
    s = rope.scaling
    original = float(s.get("original_max_position_embeddings") or max_positions)
    scale = s.get("attention_factor")
    attention = float(scale) if scale is not None else (0.1 * math.log(factor) + 1.0 if factor > 1 else 1.0)
    if scale is None and (s.get("mscale") or s.get("mscale_all_dim")):
        raise UnsupportedModelError("yarn with 'mscale' is not supported; use 'attention_factor'")

    def dimension(rotations: float) -> float:
        return head_dim * math.log(original / (rotations * 2 * math.pi)) / (2 * math.log(rope.theta))

    low, high = dimension(float(s.get("beta_fast") or 32)), dimension(float(s.get("beta_slow") or 1))
    if s.get("truncate", True):
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, head_dim - 1)
    ramp = ((torch.arange(head_dim // 2).float() - low) / max(high - low, 0.001)).clamp(0, 1)
    positions = rope.theta ** (torch.arange(0, head_dim, 2).float() / head_dim)
    return (1.0 / (factor * positions)) * ramp + (1.0 / positions) * (1 - ramp), attention


def rotation_table(rope: RopeConfig, head_dim: int, max_positions: int, device: torch.device) -> Tensor:
    """[max_positions, head_dim / 2] complex64: the rotation of every pair at every position."""
    freqs, factor = inverse_frequencies(rope, head_dim, max_positions)
    if device.type == "meta":
        return torch.empty(max_positions, head_dim // 2, dtype=torch.complex64, device=device)
    angles = torch.arange(max_positions).float().unsqueeze(1) * freqs.unsqueeze(0)
    return (torch.polar(torch.ones_like(angles), angles) * factor).to(device)


def rotate_(x: Tensor, rotation: Tensor) -> None:
    """Rotates x [N, heads, head_dim] in place by `rotation` [N, 1, head_dim / 2] complex64."""
    pairs = x.unflatten(-1, (-1, 2))
    if x.dtype == torch.float32:
        torch.view_as_complex(pairs).mul_(rotation)
    else:
        rotated = torch.view_as_complex(pairs.float()) * rotation
        pairs.copy_(torch.view_as_real(rotated))


def interleave_rows(weight: Tensor, head_dim: int) -> Tensor:
    """Permutes the rows (first axis) of a q or k projection, bias or norm from halves to side-by-side pairs."""
    heads = weight.shape[0] // head_dim
    halves = weight.reshape(heads, 2, head_dim // 2, *weight.shape[1:])
    return halves.transpose(1, 2).reshape(weight.shape)
