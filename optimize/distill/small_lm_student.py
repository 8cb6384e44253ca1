"""A small LM as student: KL to the target's distribution at every position of a text.

Distillation of Hinton et al. 2015 (arXiv 1503.02531) at temperature 1, with cross-entropy against the target's best
token beside it, on text of the target's own (as in Zhou et al. 2023, "DistillSpec", arXiv 2310.08461). The target's
distributions are all that is asked of it.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Protocol

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from optimize.distill.loss import Targets, vocabulary_loss
from optimize.distill.packing import Batch
from optimize.distill.student import mixed_precision
from optimize.distill.target import Teacher


class LanguageModel(Protocol):
    """A decoder, an `nn.Module`, whose logits are `hidden` times `output_weight`."""

    @property
    def output_weight(self) -> Tensor:
        """[V, H]"""

    def vocabulary(self) -> list[nn.Parameter]:
        """Embedding and output layer."""

    def hidden(self, batch: Batch) -> Tensor:
        """[B, L, H] of every token of its document so far."""

    def tensors(self) -> dict[str, Tensor]:
        """What a checkpoint holds; copies on the CPU."""


class SmallLMStudent:
    """Implements optimize.distill.student.Student. Without `train_vocabulary` embedding and output layer stay."""

    stateless = True

    def __init__(self, model: LanguageModel, teacher: Teacher, train_vocabulary: bool) -> None:
        assert isinstance(model, nn.Module)
        self.model, self.teacher = model, teacher
        self.network: nn.Module = model
        self.target_ids = torch.arange(teacher.vocab_size, device=teacher.device)
        self.vocabulary = self.model.vocabulary()
        for table in self.vocabulary:
            table.requires_grad_(train_vocabulary)

    def losses(self, batch: Batch, hard: float, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        """See Student.losses."""
        chains = batch.chains[0]
        _, normed = self.teacher.hidden(batch)
        targets = Targets.of(self.teacher, normed.flatten(0, 1)[chains.start], self.target_ids, hard, dtype)
        del normed
        with mixed_precision(batch.ids.device):
            rows = self.model.hidden(batch).flatten(0, 1)[chains.start].to(dtype)
            at = torch.arange(len(rows), device=rows.device)
            total, agrees = vocabulary_loss(rows, self.model.output_weight, targets, at, chains.weights)
        weight = chains.weights.sum().clamp(min=1e-6)
        return (total / weight)[None], ((agrees * chains.weights).sum() / weight)[None]

    def outputs(self, batch: Batch, features: Tensor, steps: int) -> Iterator[Tensor]:
        """See Student.outputs: one pass, `stateless`."""
        yield self.model.hidden(batch)

    def scores(self, rows: Tensor) -> Tensor:
        """See Student.scores."""
        return F.linear(rows, self.model.output_weight.to(rows.dtype))
