"""What a GPU's steps need besides weights and KV pool, reckoned from their shapes before any of it is allocated.

Three things are large: logits that penalties have changed, and counts of tokens, both as wide as the vocabulary; logits
that stay where captured graphs look for them; the activations of a prefill step. For 8B, 256 rows and no drafts that
makes 2.1 GiB, 0.8 of them for rows and graphs: capturing took 0.5 on an H100.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from server.engine.gpu.tiers import batch_tiers
from server.engine.scheduler import PROMPT_LOGPROB_ROWS

_ADJUSTED_BYTES = 8
"""A position and vocabulary entry where penalties or biases apply: float32, among the graphs' memory and once more
while a step runs eagerly."""
_COUNT_BYTES = 4
"""A row and vocabulary entry: how often its tokens have occurred."""
_SCORE_BYTES = 16
"""A scored prompt position and vocabulary entry: logits, float32, their logarithms, a selection's work."""
_KNOWN_BYTES = 9
"""A token of a row's context, kept by slot: its id, and the block tables."""
_FEEDFORWARD = 16
"""Values a token in units of the hidden size: a gated layer of three and a half hidden sizes, and what flows past."""
_DRAFTED = 16
"""The same of what a drafter's network does: a layer of its own, as wide as the target's at most, and features of three
of the target's layers, by themselves, joined and shifted."""
_CHUNKS = 2
"""Prompt chunks come in all sizes, so the allocator can not always use what the last one left."""
_FIXED = 256 << 20
"""Workspaces of libraries, compiled kernels, instantiated graphs."""


@dataclass(frozen=True, slots=True)
class StepSizes:
    """Of the largest steps: verify steps of `num_rows` rows with `num_drafts` drafts, prompt chunks of `num_tokens`
    tokens. `context` bounds a row's known tokens; `item` is the bytes of an activation. `network`: the drafter has one.
    """

    num_rows: int
    num_drafts: int
    num_tokens: int
    context: int
    vocab_size: int
    hidden_size: int
    item: int
    graphs: bool
    ratio: bool
    network: bool = False


def working_bytes(s: StepSizes) -> int:
    """An estimate, on the high side."""
    positions = s.num_rows * (1 + s.num_drafts)
    by_position = _ADJUSTED_BYTES * s.vocab_size
    if s.ratio and s.num_drafts:  # what the drafts were drawn from, and the same of the target
        by_position += (4 + 4) * s.vocab_size
    activations = _FEEDFORWARD * s.hidden_size * s.item
    logits = s.vocab_size * s.item
    drafted = _DRAFTED * s.hidden_size * s.item if s.network and s.num_drafts else 0
    verify = positions * (by_position + activations + drafted + logits)
    if drafted:  # one draft of every row at a time
        verify += s.num_rows * logits
    kept = sum(batch_tiers(s.num_rows)) * logits if s.graphs else 0
    known = s.num_rows * (s.context * _KNOWN_BYTES + s.vocab_size * _COUNT_BYTES)
    scored = min(PROMPT_LOGPROB_ROWS, s.num_tokens) * s.vocab_size * _SCORE_BYTES
    prefill = s.num_tokens * (activations * _CHUNKS + drafted) + min(s.num_rows, s.num_tokens) * logits + scored
    return verify + kept + prefill + known + _FIXED


def hidden_size(num_parameters: int, num_layers: int) -> int:
    """Of a decoder of that size: a layer has about twelve weights a squared unit of width."""
    return math.isqrt(num_parameters // (12 * num_layers))
