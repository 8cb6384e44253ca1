"""Keeps answers from ending before their `min_tokens`, at every position of a verify step."""

from __future__ import annotations

from torch import Tensor

from server.sampling.rows import expand
from server.sampling.state import SamplingBatch
from server.spec.types import Layout, SlotState


def keep_going(logits: Tensor, layout: Layout, batch: SamplingBatch, state: SlotState, slot_ids: Tensor) -> Tensor:
    """Copy of `logits` [T, V] in which a row's ends are -inf wherever its output is shorter than its `min_tokens`.

    Arguments as in `process`. Offset j follows the row's output and j drafts, which is the output that plain decoding
    would have had there. All other logits keep their bits.
    """
    if batch.end_ids is None or batch.min_tokens is None:
        return logits
    num_output = state.num_tokens.index_select(0, slot_ids) - state.prompt_len.index_select(0, slot_ids)
    is_early = expand(num_output, layout) + layout.offsets < expand(batch.min_tokens, layout)
    # A slot that has no ends still holds its predecessor's, and min_tokens 0.
    ends = expand(batch.end_ids, layout)
    return logits.scatter(1, ends, logits.gather(1, ends).masked_fill(is_early[:, None], -float("inf")))
