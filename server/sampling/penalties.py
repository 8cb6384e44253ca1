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

_PROMPT_UNIT = 1 << 32


def penalise(
    logits: Tensor,
    layout: Layout,
    drafts: Drafts,
    batch: SamplingBatch,
    state: SlotState,
    slot_ids: Tensor,
    max_tokens_host: int,
) -> Tensor:
    """Penalised copy of `logits` [T, V]; arguments as in `process`. Neutral rows keep their bits.

    Only tokens that occur are touched: what a position's logit becomes is a function of the token and of how often it
    occurred, so entries that name a token twice, or name one that does not count, write the same value.
    """
    tokens, units = _history(state, slot_ids, max_tokens_host)
    counts = tokens.new_zeros(tokens.shape[0], logits.shape[1]).scatter_add_(1, tokens, units)
    counts, tokens = expand(counts, layout), expand(tokens, layout)
    num_drafts = drafts.tokens.shape[1]
    if num_drafts > 0:
        draft_tokens = expand(drafts.tokens, layout)
        before = torch.arange(num_drafts, device=logits.device) < layout.offsets[:, None]
        counts.scatter_add_(1, draft_tokens, _count_drafts(before))
        tokens = torch.cat([tokens, draft_tokens], 1)
    return logits.scatter(1, tokens, _penalised(logits.gather(1, tokens), counts.gather(1, tokens), layout, batch))


def _penalised(values: Tensor, counts: Tensor, layout: Layout, batch: SamplingBatch) -> Tensor:
    """The penalties' formulas, elementwise on logits [T, L] and their tokens' occurrences."""
    if batch.any_repetition:
        penalty = expand(batch.repetition_penalty, layout)[:, None]
        values = torch.where(counts > 0, torch.where(values > 0, values / penalty, values * penalty), values)
    if batch.any_presence_or_frequency:
        num_output = counts & (_PROMPT_UNIT - 1)
        values = values - expand(batch.presence_penalty, layout)[:, None] * (num_output > 0)
        values = values - expand(batch.frequency_penalty, layout)[:, None] * num_output
    return values


def _history(state: SlotState, slot_ids: Tensor, max_tokens: int) -> tuple[Tensor, Tensor]:
    """The rows' known tokens [R, L] and what each adds to its token's count: 1 in the output, 2**32 in the prompt."""
    history = state.history[:, :max_tokens].index_select(0, slot_ids)
    index = torch.arange(history.shape[1], device=history.device)
    is_known = index < state.num_tokens.index_select(0, slot_ids)[:, None]
    in_prompt = index < state.prompt_len.index_select(0, slot_ids)[:, None]
    # What lies past the end is undefined: let it name token 0 and count nothing.
    return history * is_known, is_known * (1 + (_PROMPT_UNIT - 1) * in_prompt)


def _count_drafts(before: Tensor) -> Tensor:
    """What each draft adds to its token's count, [T, k]: `before` says whether it precedes the position."""
    return before.to(torch.int64)
