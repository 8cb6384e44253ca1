"""What the training loop and the evaluation ask of a drafter that learns, whatever its kind."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from optimize.distill.packing import Batch
from optimize.distill.target import Teacher


def mixed_precision(device: torch.device) -> AbstractContextManager[Any]:
    """bfloat16 on a GPU, float32 on a CPU. For the student only: the teacher computes as it is served."""
    return torch.autocast("cuda", dtype=torch.bfloat16, enabled=device.type == "cuda")


class Student(Protocol):
    """A network with its teacher. S steps of a chain, C draft tokens.

    `target_ids` [C] int64 are the target's ids of the draft tokens. `stateless`: a chain's step s at position t is what
    step 0 at t + s is, so one pass says all.
    """

    target_ids: Tensor
    stateless: bool

    @property
    def network(self) -> nn.Module:
        """What is trained."""

    @property
    def teacher(self) -> Teacher:
        """The target."""

    @property
    def vocabulary(self) -> Sequence[Tensor]:
        """Embedding and output layer, as far as they are the student's own."""

    def losses(self, batch: Batch, hard: float, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        """(mean loss [S], share of weight with the target's top token [S]); `dtype` is that of logits.

        The loss is the cross-entropy against the target's distribution and `hard` times that against its best token.
        """

    def outputs(self, batch: Batch, features: Tensor, steps: int) -> Iterator[Tensor]:
        """Of every chain, step by step, what `scores` reads, [B, L, H]; `features` are the teacher's."""

    def scores(self, rows: Tensor) -> Tensor:
        """[N, H] -> logits [N, C]."""
