"""How a drafter with a reduced vocabulary draws, on the CPU."""

from __future__ import annotations

import torch
from torch import Tensor

from server.sampling.distribution import Processed
from server.sampling.filters import filter_logits
from server.sampling.state import SamplingBatch
from server.spec.types import Layout
from server.spec.verify import draft_token


def draw(
    logits: Tensor, batch: SamplingBatch, positions: Tensor, rule: str, target_ids: Tensor, vocab_size: int
) -> tuple[Tensor, Tensor | None]:
    """One draft a row from `logits` [R, C], for the tokens at `positions` [R] -> tokens [R] and q [R, V] or None.

    `target_ids` [C] are the target's of the draft vocabulary. Temperature and filters are the row's own; penalties,
    biases and ends are left to verification. See `server.spec.verify.draft_token`.
    """
    if batch.all_greedy:
        return target_ids[Processed.dense(logits).argmax()], None
    scaled = logits.float() / batch.temperature[:, None]
    processed = Processed.dense(scaled)
    if batch.any_filter:
        num_rows = logits.shape[0]
        rows = torch.arange(num_rows)
        processed = filter_logits(scaled, Layout(rows, torch.zeros_like(rows), num_rows, 1), batch)
    return draft_token(Processed(processed.logits, vocab_size, processed.ids), batch, positions, rule, target_ids)
