"""Networks whose distributions are a table by the last token: everything about them can be worked out by hand."""

from __future__ import annotations

import torch
from torch import Tensor

from server.models.attention import AttentionBatch
from server.models.base import KVLayer


class TableModel:
    """logits of the token behind t are `table[t]`, float32 [V, V]. Implements TargetModel."""

    def __init__(self, table: Tensor) -> None:
        self.table = table
        self.vocab_size = self.num_parameters = len(table)
        self.max_position_embeddings = 1 << 20
        self.kv_layers = [KVLayer(1, 1)]
        self.dtype, self.device = torch.float32, torch.device("cpu")
        self.linear_path, self.min_rows, self.architecture = "table", 4, "Table"
        self.eos_token_ids: tuple[int, ...] = (0,)
        self.num_read: list[int] = []

    def forward(
        self,
        token_ids: Tensor,
        pools: list[Tensor],
        attn: AttentionBatch,
        logits_at: Tensor,
        feature_layers: tuple[int, ...] = (),
    ) -> tuple[Tensor, Tensor | None]:
        assert len(token_ids) == len(attn.positions) >= self.min_rows
        self.num_read.append(len(token_ids))
        return self.table[token_ids[logits_at]], None
