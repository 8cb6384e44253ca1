"""Repetition, presence and frequency penalties, at every position of a verify step.

Repetition (Keskar et al. 2019, CTRL; as in transformers) divides positive and multiplies negative logits of every
token in prompt or output. Presence and frequency (as in OpenAI's API) look at the output only: subtracted once if
the token occurred, and once per occurrence. Offset j sees the row's history and its first j drafts, which is what
plain decoding would have seen there; one count for the whole window would be wrong from the second position on.
"""

from __future__ import annotations

import torch
from torch import Tensor

from server.sampling.rows import expand
from server.sampling.state import SamplingBatch
from server.spec.types import Drafts, Layout, SlotState


def penalise(
    logits: Tensor,
    layout: Layout,
    drafts: Drafts,
    batch: SamplingBatch,
    state: SlotState,
    slot_ids: Tensor,
    max_tokens_host: int,
) -> Tensor:
    """Penalised copy of `logits` [T, V]; arguments as in `process`. Neutral rows keep their bits."""
    prompt, output = _count_history(logits, state, slot_ids, max_tokens_host)
    counts = expand(output, layout)  # owned here: either just counted or just copied
    _count_drafts(counts, layout, drafts)
    if batch.any_repetition:
        penalty = expand(batch.repetition_penalty, layout)[:, None]
        seen = (counts + expand(prompt, layout)) > 0
        logits = torch.where(seen, torch.where(logits > 0, logits / penalty, logits * penalty), logits)
    if batch.any_presence_or_frequency:
        logits = logits - expand(batch.presence_penalty, layout)[:, None] * (counts > 0)
        logits -= counts.mul_(expand(batch.frequency_penalty, layout)[:, None])
    return logits


def _count_history(like: Tensor, state: SlotState, slot_ids: Tensor, max_tokens: int) -> tuple[Tensor, Tensor]:
    """How often each token occurs in the rows' prompts and in their outputs so far: two [R, V] float32.

    Counts are small integers, exact in float32 whatever the order in which a GPU adds them.
    """
    history = state.history[:, :max_tokens].index_select(0, slot_ids)
    index = torch.arange(history.shape[1], device=history.device)
    known = index < state.num_tokens.index_select(0, slot_ids)[:, None]
    in_prompt = index < state.prompt_len.index_select(0, slot_ids)[:, None]
    history = history * known  # what lies past the end is undefined: count token 0 zero times instead
    zeros = like.new_zeros(2, slot_ids.shape[0], like.shape[1])
    prompt = zeros[0].scatter_add_(1, history, (known & in_prompt).to(like.dtype))
    output = zeros[1].scatter_add_(1, history, (known & ~in_prompt).to(like.dtype))
    return prompt, output


def _count_drafts(counts: Tensor, layout: Layout, drafts: Drafts) -> None:
    """Add to `counts` [T, V] the drafts before each position's offset."""
    num_drafts = drafts.tokens.shape[1]
    if num_drafts == 0:
        return
    before = torch.arange(num_drafts, device=counts.device) < layout.offsets[:, None]
    counts.scatter_add_(1, expand(drafts.tokens, layout), before.to(counts.dtype))
