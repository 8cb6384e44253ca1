"""A chain of drafts through an EAGLE-3 head on the CPU, one token a row after another: as its parts, or compiled.

Either holds what the last tokens have become: their projections and the residual stream.
"""

from __future__ import annotations

from typing import Protocol

import torch.nn.functional as F
from torch import Tensor

from draft_models.eagle3_cpu_network import Context, Eagle3CpuNetwork, attend
from server.quant.cpu.draft_layer import DraftLayer, Keys


class Chain(Protocol):
    """Rows are in an order in which those that end first come last."""

    def enter(self, token_ids: Tensor, positions: Tensor) -> None:
        """One more token a row, of the first rows [M]."""
        ...

    def leave(self, count: int) -> Tensor:
        """Logits [count, C] behind the last tokens of the first rows."""
        ...


class PartsChain:
    """Through `Eagle3CpuNetwork.project` and `finish`. `qkv` [M, heads + 2 kv_heads, D] and `x` [M, H], padded."""

    def __init__(self, net: Eagle3CpuNetwork, contexts: list[Context], qkv: Tensor, x: Tensor) -> None:
        self._net, self._contexts, self._qkv, self._x = net, contexts, qkv, x

    def enter(self, token_ids: Tensor, positions: Tensor) -> None:
        """See Chain."""
        count, net = len(token_ids), self._net
        short = net.min_rows - count
        if short > 0:
            token_ids, positions = F.pad(token_ids, (0, short)), F.pad(positions, (0, short))
        self._qkv, self._x = net.project(token_ids, self._x[: len(token_ids)], positions)
        for context, kv in zip(self._contexts[:count], self._qkv[:, net.config.num_heads :], strict=False):
            context.append(kv)

    def leave(self, count: int) -> Tensor:
        """See Chain."""
        mixed = attend(self._qkv, self._contexts[:count], self._net.config.num_heads)
        self._x, logits = self._net.finish(mixed, self._x)
        return logits[:count]


class CompiledChain:
    """Through a `DraftLayer`, over the drafter's pool. `qkv` [M, width], `x` [M, H]."""

    def __init__(self, layer: DraftLayer, pool: Tensor, keys: Keys, qkv: Tensor, x: Tensor) -> None:
        self._layer, self._pool, self._keys, self._qkv, self._x = layer, pool, keys, qkv, x

    def enter(self, token_ids: Tensor, positions: Tensor) -> None:
        """See Chain."""
        count = len(token_ids)
        slots = self._keys.next_places(count)
        self._x = self._x[:count]
        self._qkv = self._layer.enter(token_ids, self._x, positions, slots, self._pool)

    def leave(self, count: int) -> Tensor:
        """See Chain."""
        self._x, logits = self._layer.leave(self._qkv[:count], self._x[:count], self._keys, self._pool)
        return logits
