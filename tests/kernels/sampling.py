"""Random steps and their parameters, for the tests of verification kernels."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from server.core import SamplingParams
from server.sampling.state import SamplingBatch
from server.spec.types import Drafts, Layout


@dataclass(slots=True)
class Step:
    """R rows of W positions; every tensor on the device under test."""

    logits: Tensor
    drafts: Tensor
    num_valid: Tensor
    num_tokens: Tensor
    batch: SamplingBatch

    @property
    def layout(self) -> Layout:
        num_rows, width = self.drafts.shape[0], self.drafts.shape[1] + 1
        at = torch.arange(num_rows * width, device=self.logits.device)
        return Layout(at // width, at % width, num_rows, width)

    def as_drafts(self, probs: Tensor | None = None) -> Drafts:
        return Drafts(self.drafts, self.num_valid, probs=probs)

    @property
    def filters(self) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
        b = self.batch
        return b.temperature, b.greedy, b.top_k, b.top_p, b.min_p

    @property
    def num_slots(self) -> int:
        """Of `tables`: nobody's, and two that no row names."""
        return self.drafts.shape[0] + 3

    @property
    def by_slot(self) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """slots [R], floats [S, 6], ints [S, 5], num_tokens [S]: what the kernels take of the rows."""
        return *self.tables(self.num_slots), self.num_tokens_by_slot(self.num_slots)

    def tables(self, num_slots: int) -> tuple[Tensor, Tensor, Tensor]:
        """slots [R], floats [S, 6], ints [S, 5]: the rows' parameters by slot, backwards from the last but one.

        What no row names would break whoever read it.
        """
        b, num_rows = self.batch, self.drafts.shape[0]
        slots = num_slots - 2 - torch.arange(num_rows, device=self.logits.device)
        floats = torch.full((num_slots, 6), torch.nan, device=self.logits.device)
        ints = torch.full((num_slots, 5), -(2**40), device=self.logits.device)
        floats[-1], ints[-1] = 1.0, 1  # nobody's: greedy
        for column, values in enumerate((b.temperature, b.top_p, b.min_p)):
            floats[slots, column] = values
        for column, values in enumerate((b.top_k, b.seeds, b.choices, b.greedy)):
            ints[slots, column] = values.to(torch.int64)
        return slots, floats, ints

    def num_tokens_by_slot(self, num_slots: int) -> Tensor:
        """`num_tokens` [S] where `tables` puts the rows."""
        known = self.num_tokens.new_full((num_slots,), -(2**40))
        return known.index_copy(0, self.tables(num_slots)[0], self.num_tokens)


def to_device(batch: SamplingBatch, device: torch.device) -> SamplingBatch:
    for name in ("temperature", "top_p", "min_p", "top_k", "seeds", "choices", "greedy"):
        setattr(batch, name, getattr(batch, name).to(device))
    return batch


def random_step(
    params: list[SamplingParams],
    width: int,
    vocab_size: int,
    dtype: torch.dtype,
    device: torch.device,
    peak: float = 3.0,
) -> Step:
    """Random logits, and drafts of which many are likely tokens."""
    num_rows = len(params)
    logits = (torch.randn(num_rows * width, vocab_size, device=device) * peak).to(dtype)
    likely = logits.float().argmax(1).view(num_rows, width)[:, :-1]
    random = torch.randint(vocab_size, likely.shape, device=device)
    drafts = torch.where(torch.rand(likely.shape, device=device) < 0.7, likely, random)
    num_valid = torch.randint(0, width, (num_rows,), device=device)
    num_valid[0] = width - 1
    num_tokens = torch.randint(1, 5000, (num_rows,), device=device)
    return Step(logits, drafts, num_valid, num_tokens, to_device(SamplingBatch.of(params, vocab_size), device))
