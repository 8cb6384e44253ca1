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
    def rows(self) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
        return *self.filters, self.batch.seeds, self.batch.choices, self.num_tokens


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
