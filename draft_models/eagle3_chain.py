"""What chains of drafts on the device share: where tokens lie, how a draft is drawn, events that mean nothing."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from server.kernels.paged import PagedRows, places
from server.sampling.distribution import Processed
from server.sampling.rng import DRAFT, TARGET, noise_keys
from server.sampling.state import SamplingBatch
from server.spec.device import CachedDrafts, DeviceStep
from server.spec.types import Carry, Drafts, Verdict


@dataclass(frozen=True, slots=True)
class ChainShape:
    """Sizes of the per-slot state and the KV pool: the runner's own (`num_slots` counts the padding slot)."""

    num_slots: int
    num_blocks: int
    block_size: int
    max_draft_tokens: int


class Sampler(Protocol):
    """Draws one draft a row, in target ids, without a synchronisation."""

    def __call__(
        self, logits: Tensor, step: DeviceStep, positions: Tensor, vocab_ids: Tensor | None
    ) -> tuple[Tensor, Tensor | None]:
        """Maps logits [R, C] for the tokens at `positions` [R] -> tokens [R] int64 and q [R, V] float32.

        `vocab_ids` [C] are the target's ids of a reduced vocabulary. q is None where verification needs none.
        """


class TorchSampler:
    """The reference: `coupled` draws with the target's noise (no q), `ratio` with noise of its own."""

    def __init__(self, vocab_size: int, rule: str) -> None:
        self.vocab_size, self.rule = vocab_size, rule

    def __call__(
        self, logits: Tensor, step: DeviceStep, positions: Tensor, vocab_ids: Tensor | None
    ) -> tuple[Tensor, Tensor | None]:
        """See Sampler."""
        processed = Processed(logits.float() / step.temperature[:, None], self.vocab_size, vocab_ids)
        keys = noise_keys(step.seeds, step.choices, positions, TARGET if self.rule == "coupled" else DRAFT)
        tokens = processed.sample(keys, step.greedy)
        return tokens, None if self.rule == "coupled" else processed.probs(step.greedy)


def rows_from(step: DeviceStep, starts: Tensor, width: int, extra: int) -> PagedRows:
    """`width` query tokens a row from `starts` [R] on; `extra` tokens may lie behind the known ones."""
    return PagedRows(
        step.slots, starts, step.block_tables, step.block_size, max_context=step.max_context + extra, width=width
    )


def chunk_positions(rows: PagedRows, num_tokens: int) -> tuple[Tensor, Tensor, Tensor]:
    """Of the N tokens of ragged `rows`: positions [N], places [N] and the index [R] of each row's last token.

    Padding tokens behind the last row lie at the null block. No synchronisation.
    """
    assert rows.offsets is not None
    offsets = rows.offsets.to(torch.int64)
    at = torch.arange(num_tokens, device=offsets.device)
    row = torch.searchsorted(offsets[1:], at, right=True)
    inside = row < rows.num_rows
    row = row.clamp(max=rows.num_rows - 1)
    positions = (at - offsets[row] + rows.starts[row]) * inside
    return positions, places(rows.block_tables, rows.slots[row], positions, rows.block_size, inside), offsets[1:] - 1


class DeviceOnly:
    """The host's part of a drafter that lives on the device: it hears of everything and needs nothing.

    The calls of the CPU's step are refused: `draft`, `after_verify` and `prefill_chunk` take their place.
    """

    name = "device"

    def admit(self, slot: int, token_ids: Sequence[int], prompt_len: int, prediction: Sequence[int] = ()) -> None:
        """`admit_slots` does it for the device; a `prediction` is ignored."""

    def admit_slots(self, slots: Tensor, num_tokens: Tensor, cached: CachedDrafts | None = None) -> None:
        """Nothing on the device outlives a slot's owner."""

    def reuse(self, slot: int, first: int, end: int) -> None:
        """`admit_slots` said it."""

    def observe(self, slot: int, token_ids: Sequence[int]) -> None:
        """The step's history holds them already."""

    def release(self, slot: int, complete: bool = False) -> None:
        """What the slot leaves behind is overwritten by its next owner."""

    def pause(self) -> None:
        """`resume` says when it is over."""

    def prefill(
        self, carry: Carry, token_ids: Tensor, positions: Tensor, rows: Tensor, features: Tensor | None
    ) -> None:
        raise NotImplementedError(f"{self.name} drafts inside device steps: use prefill_chunk")

    def propose(self, carry: Carry, k: int, sampling: SamplingBatch) -> Drafts:
        raise NotImplementedError(f"{self.name} drafts inside device steps: use draft")

    def commit(self, carry: Carry, drafts: Drafts, verdict: Verdict, features: Tensor | None) -> None:
        raise NotImplementedError(f"{self.name} drafts inside device steps: use after_verify")

    def upload_width(self, k: int) -> int:
        """Nothing is uploaded."""
        return 0

    def upload(self, slots: Sequence[int], limits: Sequence[int], k: int) -> list[list[int]]:
        """See upload_width."""
        return [[] for _ in slots]


def as_drafts(tokens: list[Tensor], probs: list[Tensor], step: DeviceStep) -> Drafts:
    """Stacks k tokens [R] each, and k distributions [R, V] or none."""
    return Drafts(
        tokens=torch.stack(tokens, dim=1),
        num_valid=step.limits.clamp(max=len(tokens)),
        probs=torch.stack(probs, dim=1) if probs else None,
    )
