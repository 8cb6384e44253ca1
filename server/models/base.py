"""What the runner asks of a network, and what it hands over."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from server.models.attention import AttentionBatch
from server.models.config import ModelConfig
from server.models.norm import RMSNorm
from server.quant.layer import LinearLayer


@dataclass(frozen=True, slots=True)
class KVLayer:
    """Shape of one layer's pool: [places, 2 * num_kv_heads, head_dim]."""

    num_kv_heads: int
    head_dim: int


class TargetModel(Protocol):
    """A decoder on paged attention.

    `min_rows`: a step with fewer tokens is padded up to it (see server/quant/dense.py).
    """

    vocab_size: int
    max_position_embeddings: int
    kv_layers: list[KVLayer]
    dtype: torch.dtype
    device: torch.device
    num_parameters: int
    linear_path: str
    min_rows: int
    eos_token_ids: tuple[int, ...]
    architecture: str

    def forward(
        self,
        token_ids: Tensor,
        pools: list[Tensor],
        attn: AttentionBatch,
        logits_at: Tensor,
        feature_layers: tuple[int, ...] = (),
    ) -> tuple[Tensor, Tensor | None]:
        """token_ids [N] -> (float32 logits [T, V] at the token indices `logits_at` [T], features [N, F] or None).

        `features` concatenates the outputs of the 0-based `feature_layers`. Positions are in `attn`.
        """


class OwnNetwork(TargetModel, Protocol):
    """A network of our own: what a drafter's head may take from its target."""

    config: ModelConfig
    norm: RMSNorm

    @property
    def embedding(self) -> Tensor:
        """The table [V, H] in the target's dtype."""

    @property
    def head(self) -> LinearLayer:
        """The output layer, of normed hidden states."""

    def output_rows(self, ids: Tensor) -> Tensor:
        """Rows `ids` [C] int64 of the output layer, [C, H]."""
