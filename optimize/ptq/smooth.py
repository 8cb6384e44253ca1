"""Factors of the activations' columns that layers share, and where they go.

Layers that read the same activations (q, k and v; gate and up) must agree on one factor a column, which then moves into
the norm before them. What `o_proj` and `down_proj` read comes out of no norm: their factors stay with the layer.

`o_proj` reads the outputs of `v_proj`, the same ones in every query head of a key-value head. Factors that are equal
there can be moved into the rows of `v_proj`, which is how engines without such factors take them (`optimize/export`).
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

_NORMS = {"self_attn": "input_layernorm", "mlp": "post_attention_layernorm"}
_READERS = {"self_attn": ("q_proj", "k_proj", "v_proj"), "mlp": ("gate_proj", "up_proj")}
_LOWEST, _HIGHEST = 1e-4, 1e4


@dataclass(frozen=True, slots=True)
class Group:
    """Layers that read the same activations; `norm` is where these come from, None if from no norm."""

    layers: tuple[str, ...]
    norm: str | None


def group_of(name: str) -> Group:
    """The group that a decoder's linear layer belongs to; any other layer is alone."""
    found = re.fullmatch(r"(model\.layers\.\d+)\.(self_attn|mlp)\.(\w+)", name)
    if found is None or found[3] not in _READERS[found[2]]:
        return Group((name,), None)
    readers = tuple(f"{found[1]}.{found[2]}.{reader}" for reader in _READERS[found[2]])
    return Group(readers, f"{found[1]}.{_NORMS[found[2]]}")


def groups(names: Iterable[str]) -> list[Group]:
    """The groups of these layers, each once."""
    return list(dict.fromkeys(group_of(name) for name in names))


def smoothquant_factors(
    activations: Tensor, weights: Iterable[Tensor], alpha: float, heads: Heads | None = None
) -> Tensor:
    """What the group's activations are multiplied by, [K] float32: max|W_k|^(1-α) / max|x_k|^α.

    `activations` [K] are the largest magnitudes, `weights` [O, K] of all layers of the group. Xiao et al. 2022
    (arXiv 2211.10438), equation 4, with one W for all that read x. Columns that were never seen keep factor 1. With
    `heads` (for an `o_proj`) both are the largest over the query heads of a key-value head, so they share a factor.
    """
    x = activations.float()
    w = torch.stack([weight.float().abs().amax(0) for weight in weights]).amax(0).to(x.device)
    if heads is not None:
        x, w = heads.tied(x, torch.amax), heads.tied(w, torch.amax)
    factors = w.pow(1 - alpha) / x.pow(alpha)
    dead = (x <= 2.0**-31) | (w <= 2.0**-31)
    return torch.where(dead, 1.0, factors).clamp(_LOWEST, _HIGHEST)


def shared(factors: Mapping[str, Tensor], group: Group, heads: Heads | None = None) -> Tensor | None:
    """The mean of its layers' factors, [K] float32, as modelopt's own export takes it; None if there are none.

    Of an `o_proj` also the geometric mean over the query heads of each key-value head of `heads`: factors multiply.
    """
    found = [factors[name].float().flatten() for name in group.layers if name in factors]
    if not found:
        return None
    mean = torch.stack(found).mean(0).clamp(_LOWEST, _HIGHEST)
    return mean if heads is None or not reads_heads(group) else heads.tied(mean.log(), torch.mean).exp()


def reads_heads(group: Group) -> bool:
    """Whether its layers read what attention's heads make."""
    return group.layers[0].endswith("self_attn.o_proj")


@dataclass(frozen=True, slots=True)
class Heads:
    """Of attention: `num_heads` query heads, `num_kv_heads` key-value heads."""

    num_heads: int
    num_kv_heads: int

    @staticmethod
    def of(config: Mapping[str, Any]) -> Heads:
        """Of a model's `config.json`."""
        heads = int(config["num_attention_heads"])
        return Heads(heads, int(config.get("num_key_value_heads") or heads))

    def tied(self, columns: Tensor, reduce: Callable[..., Tensor]) -> Tensor:
        """`columns` [heads · D] with one value, `reduce(values, dim=…)`, for all query heads of a key-value head."""
        by_head = columns.view(self.num_kv_heads, self.num_heads // self.num_kv_heads, -1)
        return reduce(by_head, dim=1, keepdim=True).expand_as(by_head).flatten()


def fold(norm: Tensor, factors: Tensor) -> tuple[Tensor, Tensor]:
    """(the norm's weight times `factors`, in bfloat16's precision; the factors that it really has now), [K] each.

    Weights are divided by the latter, so rounding the norm costs nothing, in whichever dtype the model is served.
    """
    before = norm.float()
    after = (before * factors.to(before.device)).bfloat16().float()
    really = torch.where((before != 0) & (after != 0), after / before, 1.0)
    return torch.where((before != 0) & (after != 0), after, before).to(norm.dtype), really
