"""How a small decoder layer lies in a larger one that computes the same; `benchmarks/widen.py` says what for.

The residual stream x [h] becomes P x + c u [H]: the columns of P are h orthonormal vectors drawn at random, and u is
the last coordinate, orthogonal to all of them. That coordinate is c at every token and in every layer, exactly, since
embeddings start it and nothing writes to it. It is what the masked rows of a vocabulary read. RMSNorm divides by the
root of (|x|² + c²) / H + eps', which is the small one's divisor times sqrt(h / H) if H eps' = h eps - c².
"""

from __future__ import annotations

import math
from typing import Protocol

import torch
from torch import Tensor

from server.models.errors import ModelSourceError

MASK = 1024.0
"""Weight of the last coordinate in the final norm, and, negated, in the masked rows of the head."""
ROWS_AT_ONCE = 8192
"""Of a vocabulary's table, in float32."""
_CONSTANT_SHARE = 1 / 16
"""Part of eps that c may take: an EAGLE-3 head's eps may be smaller than its target's by nearly as much."""


class LayerShape(Protocol):
    """What ModelConfig and Eagle3Config have in common."""

    @property
    def hidden_size(self) -> int: ...
    @property
    def num_heads(self) -> int: ...
    @property
    def num_kv_heads(self) -> int: ...
    @property
    def head_dim(self) -> int: ...
    @property
    def intermediate_size(self) -> int: ...


def constant(hidden_size: int, eps: float) -> float:
    """The last coordinate c for a small model of that width and eps: a power of two, exact in any dtype."""
    return float(2.0 ** math.floor(math.log2(math.sqrt(_CONSTANT_SHARE * hidden_size * eps))))


def widened_eps(eps: float, small: LayerShape, large: LayerShape, c: float) -> float:
    """RMSNorm's eps beside a last coordinate of c. ModelSourceError: c² is more than eps allows."""
    rest = small.hidden_size * eps - c * c
    if rest <= 0.0:
        raise ModelSourceError(f"rms_norm_eps: {eps} is too small beside the target's to be widened with it")
    return rest / large.hidden_size


def rotary_stride(small: LayerShape, large: LayerShape) -> int:
    """Every so many-th frequency pair of the large head is one of the small head."""
    return large.head_dim // small.head_dim


def widened_theta(theta: float, small: LayerShape, large: LayerShape) -> float:
    """The rotary base that gives those pairs the small head's frequencies: the same if the widths divide."""
    exponent = large.head_dim / (small.head_dim * rotary_stride(small, large))
    return theta if exponent == 1.0 else theta**exponent


def check_shapes(small: LayerShape, large: LayerShape) -> None:
    """ModelSourceError saying which dimension of `large` has no room for `small`."""
    s, big = small, large
    if big.hidden_size <= s.hidden_size:
        raise ModelSourceError(f"hidden_size: {big.hidden_size} is not larger than {s.hidden_size}")
    if big.head_dim < s.head_dim or big.head_dim % 2:
        raise ModelSourceError(f"head_dim: {big.head_dim} is not an even number of at least {s.head_dim}")
    if big.intermediate_size < s.intermediate_size:
        raise ModelSourceError(f"intermediate_size: {big.intermediate_size} is less than {s.intermediate_size}")
    if big.num_heads % big.num_kv_heads or big.num_kv_heads < s.num_kv_heads:
        raise ModelSourceError(f"heads: {big.num_heads} over {big.num_kv_heads} have no room for {s.num_kv_heads} kv")
    room = big.num_kv_heads // s.num_kv_heads * (big.num_heads // big.num_kv_heads)
    if room < s.num_heads // s.num_kv_heads:
        raise ModelSourceError(f"heads: a kv head has {s.num_heads // s.num_kv_heads} query heads, room is for {room}")


def orthonormal(rows: int, columns: int, seed: int) -> Tensor:
    """[rows, columns] float32, columns orthonormal and uniformly drawn; computed on the CPU, the same everywhere."""
    drawn = torch.randn(rows, columns, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))
    q: Tensor = torch.linalg.qr(drawn)[0]
    return q.float()


def head_map(small: LayerShape, large: LayerShape) -> tuple[Tensor, Tensor]:
    """(kv head [M], query head [N]) of the small layer that each of the large one's copies.

    Kv heads are dealt in turn; the query heads of all groups that got a copy of kv head j are dealt the query heads of
    j in turn. So copies of one head may differ in number by more than one.
    """
    group, wide = small.num_heads // small.num_kv_heads, large.num_heads // large.num_kv_heads
    kv_of = [i % small.num_kv_heads for i in range(large.num_kv_heads)]
    dealt = [0] * small.num_kv_heads
    head_of = []
    for kv in kv_of:
        for _ in range(wide):
            head_of.append(kv * group + dealt[kv] % group)
            dealt[kv] += 1
    return torch.tensor(kv_of), torch.tensor(head_of)


class Widening:
    """Maps from a small layer's tensors to those of a large one, on `device` in float32.

    h, n, m, d, I are the small layer's hidden size, heads, kv heads, head_dim and intermediate size; H, N, M, D, J the
    large one's. Outputs of heads and neurons that are there several times are divided by the number of copies.
    """

    def __init__(self, small: LayerShape, large: LayerShape, device: torch.device, seed: int) -> None:
        check_shapes(small, large)
        self.small, self.large = small, large
        basis = orthonormal(large.hidden_size - 1, small.hidden_size, seed)
        self.basis = torch.nn.functional.pad(basis, (0, 0, 0, 1)).to(device)
        self.value_basis = orthonormal(large.head_dim, small.head_dim, seed + 1).to(device)
        kv_of, head_of = head_map(small, large)
        neurons = torch.arange(large.intermediate_size) % small.intermediate_size
        self.kv_of, self.head_of, self.neuron_of = kv_of.to(device), head_of.to(device), neurons.to(device)
        self.head_copies = head_of.bincount(minlength=small.num_heads).to(device, torch.float32)
        self.neuron_copies = neurons.bincount(minlength=small.intermediate_size).to(device, torch.float32)
        pairs = torch.arange(small.head_dim // 2) * rotary_stride(small, large)
        self.rotary_at = torch.cat([pairs, pairs + large.head_dim // 2]).to(device)
        self.norm_scale = math.sqrt(small.hidden_size / large.hidden_size)

    def reads(self, weight: Tensor, norm: Tensor) -> Tensor:
        """[O, h] behind a norm of weights [h] -> [O, H] behind a norm of ones."""
        return (weight * (norm * self.norm_scale)) @ self.basis.T

    def writes(self, weight: Tensor) -> Tensor:
        """[h, K] that adds to the residual stream -> [H, K]; the last coordinate stays as it is."""
        return self.basis @ weight

    def queries(self, weight: Tensor) -> Tensor:
        """[n d, X] -> [N D, X], scaled by sqrt(D / d) against the attention's factor of D^-0.5."""
        return self._rotary(weight, self.head_of).mul_(math.sqrt(self.large.head_dim / self.small.head_dim))

    def keys(self, weight: Tensor) -> Tensor:
        """[m d, X] -> [M D, X]; rows of the frequency pairs in between are zero."""
        return self._rotary(weight, self.kv_of)

    def _rotary(self, weight: Tensor, heads: Tensor) -> Tensor:
        wide: Tensor = weight.new_zeros(len(heads), self.large.head_dim, weight.shape[1])
        wide[:, self.rotary_at] = weight.unflatten(0, (-1, self.small.head_dim))[heads]
        return wide.flatten(0, 1)

    def values(self, weight: Tensor) -> Tensor:
        """[m d, X] -> [M D, X]: every head's d values, turned into D by one orthonormal map."""
        by_head: Tensor = weight.unflatten(0, (-1, self.small.head_dim))
        return (self.value_basis @ by_head[self.kv_of]).flatten(0, 1)

    def mixed(self, weight: Tensor) -> Tensor:
        """[O, n d] on the heads' outputs -> [O, N D]; undoes `values`."""
        by_head: Tensor = weight.unflatten(1, (-1, self.small.head_dim)) / self.head_copies[:, None]
        return (by_head[:, self.head_of] @ self.value_basis.T).flatten(1)

    def table(self, rows: Tensor, size: int, axis: tuple[float, float], dtype: torch.dtype) -> Tensor:
        """Rows [V, h] of a vocabulary -> [size, H]; `axis` is the last coordinate of (its rows, rows beyond them).

        Rows beyond the vocabulary are copies of its own in turn.
        """
        wide = torch.empty(size, self.large.hidden_size, dtype=dtype, device=rows.device)
        for start in range(0, size, ROWS_AT_ONCE):
            ids = torch.arange(start, min(start + ROWS_AT_ONCE, size), device=rows.device)
            part = rows[ids % len(rows)] @ self.basis.T
            part[:, -1] = torch.where(ids < len(rows), axis[0], axis[1])
            wide[start : start + len(ids)] = part
        return wide

    def head(self, rows: Tensor, norm: Tensor, size: int, dtype: torch.dtype) -> Tensor:
        """The language-model head [V, h] behind the final norm's weights [h] -> [size, H] behind `final_norm`.

        A masked row's logit is that of the row it copies less MASK² c / rms(x), so it can never be the largest.
        """
        return self.table(rows * (norm * self.norm_scale), size, (0.0, -MASK), dtype)

    def final_norm(self, dtype: torch.dtype) -> Tensor:
        """Ones, and MASK at the last coordinate, [H]."""
        weight = torch.ones(self.large.hidden_size, dtype=dtype, device=self.basis.device)
        weight[-1] = MASK
        return weight
