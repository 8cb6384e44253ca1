"""Runs one step on the device: draft, forward, verify, commit. Plain decoding is the same step with no drafts.

The sequence state (tokens, lengths, block tables, sampling parameters) lives in per-slot tensors; a step gathers from
them by slot index. On the CPU rows are ragged, since padding costs compute there; elsewhere every row has the same
width, and a step waits for the device in one place only, where its result is read (`to_host`). Reading that result one
step late, so that the next step is launched before it, belongs to the loop and is not done yet.
"""

from __future__ import annotations

import time
from collections.abc import Callable

import torch
from torch import Tensor

from draft_models.protocol import Drafter
from server.core import Phase, StepPlan
from server.engine.prompt_logprobs import add_scores, positions, to_score
from server.engine.result import DoneStep, StepResult, to_host
from server.engine.sequence import Sequence
from server.engine.step_runner import RunnerShape
from server.models.attention import AttentionBatch
from server.models.base import TargetModel
from server.models.paging import Span, make_pools, padded_batch, ragged_batch
from server.sampling.logprobs import emitted_logprobs
from server.sampling.process import process
from server.sampling.rows import spread
from server.sampling.state import SamplingState
from server.spec.types import Carry, Drafts, Layout, SlotState, Verdict
from server.spec.verify import verify

Trim = Callable[[Drafts, Carry], Drafts]
"""Cuts drafts that are not worth verifying (ragged batches only)."""
Keep = Callable[[Carry, list[int], Tensor], None]
"""`draft_models.protocol.KeepsFeatures.keep`."""


class Runner:
    """Owns the device state of one engine. Not thread-safe; called by the engine loop only."""

    overlaps = False
    num_graph_misses = 0

    def __init__(self, model: TargetModel, drafter: Drafter | None, shape: RunnerShape) -> None:
        self.model, self.drafter, self.shape = model, drafter, shape
        self.device, self.linear_path = model.device, model.linear_path
        self.ragged = self.device.type == "cpu" if shape.ragged is None else shape.ragged
        self.trim: Trim | None = None
        places = shape.num_blocks * shape.block_size
        self.pools = make_pools(model.kv_layers, places, model.dtype, self.device)
        slots, length = shape.max_num_seqs, shape.max_model_len + shape.max_draft_tokens + 2
        self.state = SlotState(
            history=torch.zeros(slots, length, dtype=torch.int64, device=self.device),
            num_tokens=torch.zeros(slots, dtype=torch.int64, device=self.device),
            prompt_len=torch.zeros(slots, dtype=torch.int64, device=self.device),
        )
        table_len = -(-length // shape.block_size) + 1
        self.block_tables = torch.zeros(slots, table_len, dtype=torch.int64, device=self.device)
        self._num_listed = [0] * slots
        self.sampling = SamplingState(slots, model.vocab_size, self.device)
        self._following = False
        self._features: Tensor | None = None
        self._feature_layers = drafter.feature_layers if drafter is not None else ()
        self._keep: Keep | None = getattr(drafter, "keep", None)

    # -- host events ---------------------------------------------------------------------------------------

    def admit(self, sequences: list[Sequence]) -> None:
        """Fills the slots that the scheduler gave to `sequences`."""
        for seq in sequences:
            self._admit(seq)

    def _admit(self, seq: Sequence) -> None:
        slot, tokens = seq.slot, torch.tensor(seq.token_ids, dtype=torch.int64)
        self.state.history[slot, : seq.num_tokens] = tokens.to(self.device, non_blocking=True)
        self.state.num_tokens[slot] = seq.num_tokens
        self.state.prompt_len[slot] = seq.prompt_len
        self._num_listed[slot] = 0
        request = seq.request
        ends = seq.ends if seq.early else ()
        self.sampling.set(slot, request.sampling, request.choice, request.min_tokens, ends)
        if self.drafter is not None:
            prediction = request.prediction_ids[: self.shape.max_model_len]
            self.drafter.admit(slot, seq.token_ids, seq.prompt_len, prediction)
            if seq.draft_kv is not None:
                self.drafter.reuse(slot, seq.draft_kv.first, seq.draft_kv.end)

    def scrub(self, blocks: list[int]) -> None:
        """Zeroes blocks: masked attention multiplies stale places by zero, which does not rid it of a NaN."""
        size = self.shape.block_size
        for pool in [*self.pools, *getattr(self.drafter, "pools", [])]:
            for block in blocks:
                pool[block * size : (block + 1) * size].zero_()

    def release(self, slot: int, complete: bool = False) -> None:
        """The slot is free: nothing of its last owner may be seen by the next.

        `complete` says that the owner's answer came to its natural end.
        """
        self.block_tables[slot] = 0
        self.sampling.clear(slot)
        if self.drafter is not None:
            self.drafter.release(slot, complete)

    # -- a step --------------------------------------------------------------------------------------------

    def launch(self, plan: StepPlan, sequences: list[Sequence]) -> DoneStep:
        """Runs `plan`; `sequences` are its rows' owners. The host state is not touched."""
        started = time.perf_counter()
        self._sync_tables(sequences)
        if self.sampling.early_slots:
            for seq in sequences:
                if seq.slot in self.sampling.early_slots and not seq.early:
                    self.sampling.end_freely(seq.slot)
        if plan.phase is Phase.PREFILL:
            return DoneStep(self._prefill(plan, sequences))
        carry = self._carry(plan, sequences)
        before_drafts = time.perf_counter()
        drafts = self._propose(carry, plan)
        drafting = time.perf_counter() - before_drafts
        layout, token_ids, batch = self._prepare(carry, drafts, sequences)
        at = torch.arange(layout.rows.shape[0], device=self.device)
        logits, features = self._forward(token_ids, batch, at, plan.follows)
        result = self._decide(carry, drafts, layout, logits, sequences, features, verifying=True)
        result.verify_ms = (time.perf_counter() - started - drafting) * 1e3
        result.draft_ms = drafting * 1e3
        return DoneStep(result)

    def _prefill(self, plan: StepPlan, sequences: list[Sequence]) -> StepResult:
        spans = [
            Span(row.start, row.num_tokens, seq.blocks, seq.contiguous)
            for row, seq in zip(plan.rows, sequences, strict=True)
        ]
        chunks = [s.token_ids[r.start : r.start + r.num_tokens] for r, s in zip(plan.rows, sequences, strict=True)]
        token_ids = torch.tensor([t for chunk in chunks for t in chunk], dtype=torch.int64)
        ends = torch.tensor([len(c) for c in chunks]).cumsum(0) - 1
        sampling = [i for i, row in enumerate(plan.rows) if row.samples]
        batch = self._ragged(spans, len(token_ids))
        token_ids = token_ids.to(self.device, non_blocking=True)
        at, scored = ends[sampling], to_score(plan.rows, sequences)
        if scored:
            at = torch.cat([at, positions(scored, plan.rows, ends)])
        shown = self.drafter is not None and plan.follows and getattr(self.drafter, "chain", True)
        logits, features = self._forward(token_ids, batch, at.to(self.device, non_blocking=True), shown)
        carry = self._carry(plan, sequences)
        if features is not None:
            self._remember(carry, features[ends.to(self.device, non_blocking=True)])
        if self._keep is not None and features is not None and not shown:
            self._keep(carry, [len(c) for c in chunks], features[: len(token_ids)])
        if self.drafter is not None and shown:  # paused: it does not run at all
            num = len(token_ids)
            rows = torch.repeat_interleave(torch.tensor([len(c) for c in chunks])).to(self.device, non_blocking=True)
            wanted = None if features is None else features[:num]
            self.drafter.prefill(carry, token_ids, batch.positions[:num], rows, wanted)
        result = StepResult.silent(len(chunks), len(token_ids))
        result.chained = [shown] * len(chunks)
        if scored:
            logits, prompt = logits[: len(sampling)], logits[len(sampling) :]
            add_scores(result, scored, sequences, prompt)
        if sampling:
            done = [sequences[i] for i in sampling]
            carry = self._carry(StepPlan(plan.phase, [plan.rows[i] for i in sampling]), done)
            drafts = Drafts.none(len(done), self.device)
            layout = self._layout([1] * len(done), 1)
            decided = self._decide(carry, drafts, layout, logits, done, None, verifying=False)
            for i, row in enumerate(sampling):
                result.emitted[row], result.logprobs[row] = decided.emitted[i], decided.logprobs[i]
                result.broken[row] |= decided.broken[i]
        return result

    def _carry(self, plan: StepPlan, sequences: list[Sequence]) -> Carry:
        slots = [row.slot for row in plan.rows]
        slot_ids = torch.tensor(slots, dtype=torch.int64).to(self.device, non_blocking=True)
        return Carry(
            slots=slots,
            slot_ids=slot_ids,
            state=self.state,
            max_tokens_host=max(s.num_tokens for s in sequences),
            limits=[row.max_drafts for row in plan.rows],
            block_tables=self.block_tables[slot_ids],
            blocks=[s.blocks for s in sequences],
            tokens_host=[s.num_tokens for s in sequences],
            chunks=[(row.start, row.num_tokens) for row in plan.rows],
            features=None if self._features is None else self._features[slot_ids],
        )

    def _propose(self, carry: Carry, plan: StepPlan) -> Drafts:
        k = plan.num_draft_tokens
        if self.drafter is not None and not plan.follows and self._following:
            self.drafter.pause()
        self._following = plan.follows and self.drafter is not None
        if self.drafter is None or k == 0 or not any(carry.limits):
            return Drafts.none(len(carry.slots), self.device)
        drafts = self.drafter.propose(carry, k, self.sampling.gather(carry.slots, carry.slot_ids))
        if self.ragged and self.trim is not None:
            drafts = self.trim(drafts, carry)
        return drafts

    def _prepare(
        self, carry: Carry, drafts: Drafts, sequences: list[Sequence]
    ) -> tuple[Layout, Tensor, AttentionBatch]:
        """Every row's last committed token and its drafts, where they sit and what they see."""
        known = self.state.num_tokens[carry.slot_ids]
        last = self.state.history[carry.slot_ids, known - 1]
        table = torch.cat([last.unsqueeze(1), drafts.tokens], dim=1)
        if self.ragged:
            valid = drafts.num_valid_host if drafts.num_valid_host is not None else drafts.num_valid.tolist()
            widths = [1 + v for v in valid]
            layout = self._layout(widths, max(widths))
            spans = [Span(s.num_tokens - 1, w, s.blocks, s.contiguous) for s, w in zip(sequences, widths, strict=True)]
            token_ids = table[layout.rows, layout.offsets] if layout.width > 1 else last
            return layout, token_ids, self._ragged(spans, token_ids.shape[0])
        width = table.shape[1]
        layout = self._layout([width] * len(sequences), width)
        padding = max(0, self.model.min_rows - table.numel())
        reach = carry.max_tokens_host + width - 1
        batch = padded_batch(known - 1, width, carry.block_tables, self.shape.block_size, reach, padding)
        return layout, table.view(-1), batch

    def _layout(self, widths: list[int], width: int) -> Layout:
        counts = torch.tensor(widths, dtype=torch.int64)
        rows = torch.repeat_interleave(counts, output_size=sum(widths))
        offsets = torch.arange(rows.shape[0]) - (counts.cumsum(0) - counts)[rows]
        rows, offsets = (t.to(self.device, non_blocking=True) for t in (rows, offsets))
        return Layout(rows, offsets, len(widths), width)

    def _ragged(self, spans: list[Span], num_tokens: int) -> AttentionBatch:
        batch = ragged_batch(spans, self.shape.block_size, max(0, self.model.min_rows - num_tokens))
        return batch if self.device.type == "cpu" else batch.to(self.device)

    def _forward(
        self, token_ids: Tensor, batch: AttentionBatch, logits_at: Tensor, follows: bool
    ) -> tuple[Tensor, Tensor | None]:
        """Pads to the model's least number of rows, for tokens and for logits alike. Features for a drafter that
        `follows`, or keeps them for when it will.
        """
        wanted = logits_at.shape[0]
        short = self.model.min_rows - token_ids.shape[0]
        if short > 0:
            token_ids = torch.cat([token_ids, token_ids.new_zeros(short)])
        if wanted < self.model.min_rows:
            logits_at = torch.cat([logits_at, logits_at.new_zeros(self.model.min_rows - wanted)])
        layers = self._feature_layers if follows or self._keep is not None else ()
        logits, features = self.model.forward(token_ids, self.pools, batch, logits_at, layers)
        return logits[:wanted], features

    def _decide(
        self,
        carry: Carry,
        drafts: Drafts,
        layout: Layout,
        logits: Tensor,
        sequences: list[Sequence],
        features: Tensor | None,
        *,
        verifying: bool,
    ) -> StepResult:
        sampling = self.sampling.gather(carry.slots, carry.slot_ids)
        processed = process(logits, layout, drafts, sampling, self.state, carry.slot_ids, carry.max_tokens_host)
        known = self.state.num_tokens[carry.slot_ids]
        verdict = verify(processed, layout, drafts, sampling, known, self.shape.rule)
        logprobs = None
        if sampling.max_logprobs is not None:
            logprobs = emitted_logprobs(logits, layout, verdict, sampling.max_logprobs)
        self._commit(carry, known, verdict)
        if self.drafter is not None and verifying:
            by_row = None
            if features is not None:
                by_row = spread(features[: layout.rows.shape[0]], layout)
                last = torch.arange(layout.num_rows, device=self.device)
                self._remember(carry, by_row[last, verdict.num_accepted])
            if self._following:  # paused: it does not run at all
                self.drafter.commit(carry, drafts, verdict, by_row)
            elif self._keep is not None and by_row is not None:  # a step without drafts: one token a row
                self._keep(carry, [1] * layout.num_rows, by_row[:, 0])
        emitting = torch.arange(layout.width, device=self.device) < verdict.num_emitted.unsqueeze(1)
        broken = (spread(~logits.amax(-1).isfinite(), layout) & emitting).any(1)
        return to_host(verdict, drafts, logprobs, broken, sequences, layout.rows.shape[0])

    def _commit(self, carry: Carry, known: Tensor, verdict: Verdict) -> None:
        at = known.unsqueeze(1) + torch.arange(verdict.tokens.shape[1], device=self.device)
        self.state.history[carry.slot_ids.unsqueeze(1), at] = verdict.tokens
        self.state.num_tokens.index_add_(0, carry.slot_ids, verdict.num_emitted)

    def _remember(self, carry: Carry, features: Tensor) -> None:
        """`features` [R, F] are of each row's last token whose keys and values are committed: the next step's carry."""
        if self._features is None:
            self._features = features.new_zeros(self.shape.max_num_seqs, features.shape[1])
        self._features.index_copy_(0, carry.slot_ids, features)

    def _sync_tables(self, sequences: list[Sequence]) -> None:
        for seq in sequences:
            row, have, num_blocks = self.block_tables[seq.slot], self._num_listed[seq.slot], len(seq.blocks)
            if num_blocks < have:  # blocks for rejected drafts were taken back: they may be another's by now
                row[num_blocks:have] = 0
            if seq.num_synced < num_blocks:
                new = torch.tensor(seq.blocks[seq.num_synced :], dtype=torch.int64)
                row[seq.num_synced : num_blocks] = new.to(self.device, non_blocking=True)
            seq.num_synced = self._num_listed[seq.slot] = num_blocks
