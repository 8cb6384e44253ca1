"""From the target's logits to the distribution that is sampled, at every position of a verify step.

Order and meaning, per position, with the state that position would have had without drafts (the row's history and
the drafts before that offset):

1. repetition, presence and frequency penalties (`server.sampling.penalties`);
2. logit bias, added;
3. nothing that ends the answer before it has its `min_tokens` (`server.sampling.min_tokens`);
4. temperature, a divisor (greedy rows: none);
5. top_k, top_p, min_p (`server.sampling.filters`).

A row's result does not depend, in any bit, on the other rows of the batch.
"""

from __future__ import annotations

from torch import Tensor

from server.sampling.distribution import Processed
from server.sampling.filters import filter_logits
from server.sampling.min_tokens import keep_going
from server.sampling.penalties import penalise
from server.sampling.rows import expand
from server.sampling.state import SamplingBatch
from server.spec.types import Drafts, Layout, SlotState


def process(
    logits: Tensor,
    layout: Layout,
    drafts: Drafts,
    batch: SamplingBatch,
    state: SlotState,
    slot_ids: Tensor,
    max_tokens_host: int,
) -> Processed:
    """Processed logits of a verify step. `logits` [T, V] float32 is never written to.

    `slot_ids` [R] are the rows' slots in `state`; `max_tokens_host` bounds their `num_tokens`. If every row is
    greedy and nothing else is asked for, the result holds `logits` itself. A drafter processes its own logits for
    draft j with one position a row, all at offset j, and its first j drafts in `drafts.tokens`.
    """
    if batch.any_penalty:
        logits = penalise(logits, layout, drafts, batch, state, slot_ids, max_tokens_host)
    if batch.bias_ids is not None and batch.bias_values is not None:
        logits = logits.scatter_add(1, expand(batch.bias_ids, layout), expand(batch.bias_values, layout))
    logits = keep_going(logits, layout, batch, state, slot_ids)
    if batch.all_greedy:
        return Processed.dense(logits)
    logits = logits / expand(batch.temperature, layout)[:, None]
    if not batch.any_filter:
        return Processed.dense(logits)
    return filter_logits(logits, layout, batch)
