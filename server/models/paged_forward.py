"""One signature for every network on the paged KV pool, however its rows are laid out."""

from __future__ import annotations

from typing import Protocol

import torch
from torch import Tensor

from server.kernels.paged import PagedRows
from server.models.attention import AttentionBatch
from server.models.base import TargetModel
from server.models.paging import Span, padded_batch, ragged_batch


class PagedForward(Protocol):
    """token_ids [N] -> (logits [T, V] in the network's dtype at the tokens `logits_at` [T], features [N, F] or None).

    `positions` and `places` (in the pool) are [N] int64; `logits_at` None means every token.
    """

    def __call__(
        self,
        token_ids: Tensor,
        pools: list[Tensor],
        rows: PagedRows,
        positions: Tensor,
        places: Tensor,
        logits_at: Tensor | None,
        feature_layers: tuple[int, ...],
    ) -> tuple[Tensor, Tensor | None]:
        """See the class."""


class TorchForward:
    """Implements PagedForward with the network's own forward pass, in torch operations: the reference.

    Ragged rows are read on the host, so prompt chunks wait for the device here.
    """

    def __init__(self, model: TargetModel) -> None:
        self.model = model

    def __call__(
        self,
        token_ids: Tensor,
        pools: list[Tensor],
        rows: PagedRows,
        positions: Tensor,
        places: Tensor,
        logits_at: Tensor | None,
        feature_layers: tuple[int, ...],
    ) -> tuple[Tensor, Tensor | None]:
        """See PagedForward."""
        num_tokens = token_ids.shape[0]
        if logits_at is None:
            logits_at = torch.arange(num_tokens, device=token_ids.device)
        padding = max(0, self.model.min_rows - num_tokens)
        wanted = logits_at.shape[0]
        batch = self._batch(rows, places, padding)
        token_ids = torch.cat([token_ids, token_ids.new_zeros(padding)])
        logits_at = torch.cat([logits_at, logits_at.new_zeros(max(0, self.model.min_rows - wanted))])
        logits, features = self.model.forward(token_ids, pools, batch, logits_at, feature_layers)
        return logits[:wanted], None if features is None else features[:num_tokens]

    def _batch(self, rows: PagedRows, places: Tensor, padding: int) -> AttentionBatch:
        tables = rows.block_tables.long()[rows.slots]
        if rows.width:
            batch = padded_batch(rows.starts, rows.width, tables, rows.block_size, rows.max_context, padding)
            batch.slot_mapping = torch.cat([places, places.new_zeros(padding)])
            return batch
        assert rows.offsets is not None
        spans = [
            Span(start, end - begin, blocks, False)
            for start, begin, end, blocks in zip(
                rows.starts.tolist(), rows.offsets.tolist(), rows.offsets[1:].tolist(), tables.tolist(), strict=False
            )
            if begin < end
        ]
        padding += places.shape[0] - int(rows.offsets[-1])
        return ragged_batch(spans, rows.block_size, padding).to(rows.slots.device)
