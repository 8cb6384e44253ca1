"""What must hold of a head's tensors before anything is drafted with them: each is looked at once, on loading."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from server.models.config import UnsupportedModelError
from server.models.loader import WeightsError


class Checks:
    """`file_of(name)` is the file that holds a tensor, for messages; None where there are no files."""

    def __init__(self, file_of: Callable[[str], object] | None = None) -> None:
        self._file_of = file_of

    def at(self, name: str) -> str:
        """The tensor with its file."""
        return name if self._file_of is None else f"{self._file_of(name)}: {name}"

    def damaged(self, name: str, reason: str) -> WeightsError:
        """The error to raise."""
        return WeightsError(f"EAGLE-3 head: {self.at(name)} {reason}")

    def finite(self, name: str, tensor: Tensor) -> None:
        """WeightsError: the tensor holds NaN or infinities. One pass, nothing of its size is allocated."""
        low, high = tensor.aminmax()  # both are NaN if any value is
        if not bool(low.isfinite() & high.isfinite()):
            dtype = str(tensor.dtype).removeprefix("torch.")
            raise self.damaged(name, f"holds values that are not finite (NaN or infinity in {dtype})")

    def vocabulary_map(self, name: str, d2t: Tensor, draft_vocab_size: int, vocab_size: int) -> None:
        """`d2t` [C] int64 on the CPU leads every draft id to a target id of its own.

        UnsupportedModelError: its length is not the config's. WeightsError: an id outside the vocabulary, or two alike.
        """
        if tuple(d2t.shape) != (draft_vocab_size,):
            raise UnsupportedModelError(
                f"EAGLE-3 head: {self.at(name)} is {tuple(d2t.shape)}, config.json says {(draft_vocab_size,)}"
            )
        ids = d2t + torch.arange(draft_vocab_size)
        outside = ((ids < 0) | (ids >= vocab_size)).nonzero()
        if len(outside):
            draft = int(outside[0])
            raise self.damaged(
                name, f"leads draft id {draft} to token {int(ids[draft])}; the target's are 0 to {vocab_size - 1}"
            )
        ordered, order = ids.sort()
        twice = (ordered[1:] == ordered[:-1]).nonzero()
        if len(twice):
            at = int(twice[0])
            raise self.damaged(
                name, f"leads draft ids {int(order[at])} and {int(order[at + 1])} to the same token {int(ordered[at])}"
            )
