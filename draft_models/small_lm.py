"""A small language model as drafter (Leviathan et al. 2023; Chen et al. 2023): any decoder with the target's
vocabulary.

Its keys and values live in pools of its own under the target's block tables, so a block of the target is a block
here too. `valid` is the watermark of a slot: keys and values of the first `valid[slot]` tokens are right. Prompt chunks
raise it as the target runs them, and so do blocks of a prefix hit that the drafter has seen; what is missing when
drafting starts (other blocks, a pause, the last accepted draft) is computed in the first pass of `propose`.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from server.models.attention import AttentionBatch
from server.models.base import TargetModel
from server.models.paging import Span, make_pools, ragged_batch, side_by_side
from server.sampling.process import process
from server.sampling.state import SamplingBatch
from server.spec.types import Carry, Drafts, Layout, Verdict
from server.spec.verify import draft_token

CATCH_UP_CHUNK = 512
"""Tokens a pass when a long gap has to be computed, so that its activations stay small."""


class SmallLMDrafter:
    """Implements draft_models.protocol.Drafter. Drafts with the target's own processing and, under `coupled`, its
    noise."""

    name = "small-lm"
    feature_layers: tuple[int, ...] = ()
    has_distribution = True

    def __init__(self, model: TargetModel, max_num_seqs: int, num_blocks: int, block_size: int, rule: str) -> None:
        self.model, self.block_size, self.rule = model, block_size, rule
        self.pools = make_pools(model.kv_layers, num_blocks * block_size, model.dtype, model.device)
        self._valid = [0] * max_num_seqs
        self._tokens: list[list[int]] = [[] for _ in range(max_num_seqs)]

    # -- host events ---------------------------------------------------------------------------------------

    def admit(self, slot: int, token_ids: Sequence[int], prompt_len: int, prediction: Sequence[int] = ()) -> None:
        """Nothing of the slot is computed yet. A `prediction` is ignored: the model drafts what it thinks itself."""
        self._tokens[slot] = list(token_ids)
        self._valid[slot] = 0

    def reuse(self, slot: int, first: int, end: int) -> None:
        """What a prefix hit has brought from the first token on need not run."""
        self._valid[slot] = end if first == 0 else 0

    def observe(self, slot: int, token_ids: Sequence[int]) -> None:
        self._tokens[slot].extend(token_ids)

    def release(self, slot: int, complete: bool = False) -> None:
        self._tokens[slot] = []
        self._valid[slot] = 0

    def pause(self) -> None:
        """Nothing to do: the watermarks stay where they are, and `propose` closes the gap."""

    # -- in the step ---------------------------------------------------------------------------------------

    def prefill(
        self, carry: Carry, token_ids: Tensor, positions: Tensor, rows: Tensor, features: Tensor | None
    ) -> None:
        """Runs the same chunk, so that prompts cost the drafter no longer at a time than the target's token budget."""
        parts: list[tuple[int, int, int]] = []
        kept: list[slice] = []
        at = 0
        for r, (start, length) in enumerate(carry.chunks):
            if self._valid[carry.slots[r]] == start:  # else there is a gap before it: `propose` closes both
                parts.append((r, start, length))
                kept.append(slice(at, at + length))
            at += length
        if parts:
            self._run(carry, parts, torch.cat([token_ids[part] for part in kept]))
            for r, start, length in parts:
                self._valid[carry.slots[r]] = start + length

    def propose(self, carry: Carry, k: int, sampling: SamplingBatch) -> Drafts:
        """A chain of `k` greedy or coupled draws a row; rows with a lower limit ignore the rest."""
        active = [r for r, limit in enumerate(carry.limits) if limit > 0]
        width = min(k, max(carry.limits))
        num_rows = len(carry.slots)
        tokens = torch.zeros(num_rows, width, dtype=torch.int64, device=self.model.device)
        valid = [min(limit, width) for limit in carry.limits]
        rows = torch.arange(num_rows, device=tokens.device)
        probs: list[Tensor] = []
        logits = self._catch_up(carry, active)
        known = carry.state.num_tokens[carry.slot_ids]
        for j in range(width):
            drafts = Drafts(tokens[:, :j], torch.full_like(known, j))
            layout = Layout(rows, torch.full_like(rows, j), num_rows, j + 1)
            processed = process(logits, layout, drafts, sampling, carry.state, carry.slot_ids, carry.max_tokens_host)
            drawn, q = draft_token(processed, sampling, known + j, self.rule)
            tokens[:, j] = drawn
            if q is not None:
                probs.append(q)
            if j + 1 < width:
                logits = self._extend(carry, active, drawn, j)
        for r in active:
            self._valid[carry.slots[r]] = carry.tokens_host[r]
        return Drafts(
            tokens,
            torch.tensor(valid, dtype=torch.int64).to(tokens.device, non_blocking=True),
            valid,
            torch.stack(probs, dim=1) if probs else None,
            [self.name] * num_rows,
        )

    def commit(self, carry: Carry, drafts: Drafts, verdict: Verdict, features: Tensor | None) -> None:
        """Nothing to do: the watermark stands at the committed end that `propose` started from.

        Accepted drafts but the last have right keys and values too; computing them once more costs no pass, since the
        first one of the next chain runs anyway.
        """

    # -- passes through the model --------------------------------------------------------------------------

    def _catch_up(self, carry: Carry, active: list[int]) -> Tensor:
        """Computes every active row's tokens past its watermark -> logits [R, V] after the last committed one."""
        gaps = {r: (self._valid[carry.slots[r]], carry.tokens_host[r]) for r in active}
        for r, (start, end) in gaps.items():
            while end - start > CATCH_UP_CHUNK:
                self._run(carry, [(r, start, CATCH_UP_CHUNK)], self._known(carry, r, start, CATCH_UP_CHUNK))
                start += CATCH_UP_CHUNK
            gaps[r] = (start, end)
        parts = [(r, start, end - start) for r, (start, end) in gaps.items()]
        tokens = [t for r, start, n in parts for t in self._known(carry, r, start, n)]
        return self._run(carry, parts, tokens)

    def _known(self, carry: Carry, row: int, start: int, length: int) -> list[int]:
        return self._tokens[carry.slots[row]][start : start + length]

    def _extend(self, carry: Carry, active: list[int], drawn: Tensor, j: int) -> Tensor:
        """Feeds draft j of every active row, as far as the row owns blocks for it."""
        parts = [(r, carry.tokens_host[r] + j, 1) for r in active if carry.limits[r] > j + 1]
        rows = torch.tensor([r for r, _, _ in parts], dtype=torch.int64)
        return self._run(carry, parts, drawn[rows.to(drawn.device, non_blocking=True)])

    def _run(self, carry: Carry, parts: list[tuple[int, int, int]], tokens: list[int] | Tensor) -> Tensor:
        """Runs `(row, start, length)` parts -> logits [R, V] after each part's last token (zeros for other rows)."""
        ids = tokens if isinstance(tokens, Tensor) else torch.tensor(tokens, dtype=torch.int64)
        ids = ids.to(self.model.device, non_blocking=True)
        short = max(0, self.model.min_rows - ids.shape[0])
        batch = self._batch(carry, parts, short)
        ends = torch.tensor([n for _, _, n in parts]).cumsum(0) - 1
        wanted = ends.shape[0]
        if short:
            ids = torch.cat([ids, ids.new_zeros(short)])
        ends = torch.cat([ends, ends.new_zeros(max(0, self.model.min_rows - wanted))])
        logits, _ = self.model.forward(ids, self.pools, batch, ends.to(self.model.device, non_blocking=True))
        full = logits.new_zeros(len(carry.slots), logits.shape[1])
        rows = torch.tensor([r for r, _, _ in parts], dtype=torch.int64).to(full.device, non_blocking=True)
        full[rows] = logits[:wanted]
        return full

    def _batch(self, carry: Carry, parts: list[tuple[int, int, int]], padding: int) -> AttentionBatch:
        spans = [Span(start, length, carry.blocks[r], side_by_side(carry.blocks[r])) for r, start, length in parts]
        batch = ragged_batch(spans, self.block_size, padding)
        return batch if self.model.device.type == "cpu" else batch.to(self.model.device)
