"""Factors of activations moved into the layer that makes them, for formats that cannot hold them.

down_proj reads up_proj's outputs times a gate, o_proj a mixture of v_proj's outputs: multiplying a row of those weights
multiplies a column of the activations. A row's scales take the factor, so the integers stay as they are. Query heads
that share a key-value head read the same outputs of v_proj: their factors have to be equal.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from optimize.export.source import Source
from optimize.export.zero_points import zero_points
from server.quant.formats import QuantizedWeight

_MAKERS = {"mlp.down_proj": "mlp.up_proj", "self_attn.o_proj": "self_attn.v_proj"}


class Folding:
    """`rows` maps a layer to what its rows are multiplied by, [O] float32; `folded` are the layers that lose theirs."""

    def __init__(self, source: Source) -> None:
        self.rows: dict[str, Tensor] = {}
        self.folded: set[str] = set()
        for name, form in source.layers.items():
            if not form.smooth:
                continue
            for reads, makes in _MAKERS.items():
                factors = source.input_scales(name)
                if name.endswith(reads) and factors is not None:
                    self._add(source, name, name.removesuffix(reads) + makes, factors.float())

    def weight(self, name: str, weight: QuantizedWeight) -> QuantizedWeight:
        """A quantised layer as it is exported."""
        if name in self.folded:
            weight = replace(weight, format=replace(weight.format, smooth=False), input_scales=None)
        factors = self.rows.get(name)
        if factors is None:
            return weight
        if weight.scales.dim() == 2:
            factors = factors.unsqueeze(1)
        scales = weight.scales.float() * factors
        minimums = None
        if weight.minimums is not None:
            zeros = zero_points(weight)  # a zero point stays whole: rounding both products would not leave it so
            minimums = weight.minimums.float() * factors if zeros is None else -zeros * scales
        return replace(weight, scales=scales, minimums=minimums)

    def tensor(self, name: str, tensor: Tensor) -> Tensor:
        """A tensor that is not quantised as it is exported: a bias, or the weight of a layer in high precision."""
        layer, _, part = name.rpartition(".")
        factors = self.rows.get(layer)
        if factors is None or part not in ("weight", "bias"):
            return tensor
        if tensor.dim() == 2:
            factors = factors.unsqueeze(1)
        return (tensor.float() * factors).to(tensor.dtype)

    def _add(self, source: Source, name: str, maker: str, factors: Tensor) -> None:
        if maker not in source.layers and not source.has(f"{maker}.weight"):
            return
        if maker.endswith("v_proj"):
            shared = _of_shared_heads(factors, source.config)
            if shared is None:
                return
            factors = shared
        self.rows[maker] = factors
        self.folded.add(name)


def _of_shared_heads(factors: Tensor, config: Mapping[str, Any]) -> Tensor | None:
    """[heads · D] as [key-value heads · D], None where query heads of one key-value head differ."""
    heads = int(config["num_attention_heads"])
    kv_heads = int(config.get("num_key_value_heads") or heads)
    by_head = factors.view(kv_heads, heads // kv_heads, -1)
    first = by_head[:, :1]
    return first.flatten() if torch.equal(by_head, first.expand_as(by_head)) else None
