"""Log-probabilities of a prompt's own tokens, chunk by chunk."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from server.core import RowPlan, TokenLogprobs
from server.engine.result import StepResult
from server.engine.sequence import Sequence
from server.sampling.logprobs import score


@dataclass(frozen=True, slots=True)
class Scored:
    """Prompt tokens that a prefill step scores: those at `first .. end` of one row's sequence.

    The logits that score token p are those of token p - 1, which is in the chunk.
    """

    row: int
    first: int
    end: int


def to_score(rows: list[RowPlan], sequences: list[Sequence]) -> list[Scored]:
    """What a prefill step scores: nothing twice, though a chunk may run again after a preemption."""
    found: list[Scored] = []
    for i, (row, seq) in enumerate(zip(rows, sequences, strict=True)):
        if seq.prompt_logprobs is not None and seq.scoring:
            first = 1 + len(seq.prompt_logprobs)
            end = min(row.start + row.num_tokens + 1, seq.prompt_len)
            if first < end:
                found.append(Scored(i, first, end))
    return found


def positions(scored: list[Scored], rows: list[RowPlan], ends: Tensor) -> Tensor:
    """Where in the step's tokens the logits of `scored` are, [T] int64; `ends` [R] are the rows' last tokens there."""
    parts = []
    for part in scored:
        row = rows[part.row]
        first_token = int(ends[part.row]) + 1 - row.num_tokens
        parts.append(torch.arange(part.first - 1, part.end - 1) - row.start + first_token)
    return torch.cat(parts)


def add_scores(result: StepResult, scored: list[Scored], sequences: list[Sequence], logits: Tensor) -> None:
    """Puts the log-probabilities of `scored` into `result`, given their `logits` [T, V].

    A row whose logits are not finite is broken: what it says of its prompt means nothing.
    """
    owners = [sequences[part.row] for part in scored]
    tokens = [seq.token_ids[part.first : part.end] for part, seq in zip(scored, owners, strict=True)]
    wanted = [seq.request.prompt_logprobs or 0 for seq in owners]
    flat = torch.tensor([token for row in tokens for token in row], dtype=torch.int64)
    found = score(logits, flat.to(logits.device, non_blocking=True), max(wanted))
    finite = logits.amax(-1).isfinite().tolist()
    chosen, ids, values = found.chosen.tolist(), found.top_ids.tolist(), found.top_logprobs.tolist()
    result.prompt_logprobs = [[] for _ in result.emitted]
    at = 0
    for part, row, n in zip(scored, tokens, wanted, strict=True):
        span = slice(at, at + len(row))
        result.prompt_logprobs[part.row] = [
            TokenLogprobs(*entry)
            for entry in zip(row, chosen[span], (i[:n] for i in ids[span]), (v[:n] for v in values[span]), strict=True)
        ]
        result.broken[part.row] |= not all(finite[span])
        at += len(row)
