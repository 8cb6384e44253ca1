"""Documents in rows of one length, and batches of rows as the device reads them.

Whole documents lie in a row, none is cut: a token's features then come from all that stood before it. Positions begin
anew with each document, as in serving.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from optimize.distill.shards import ANSWER, CONTINUATION, TEMPLATE, USER, Document

KIND_WEIGHTS = {TEMPLATE: 0.0, USER: 0.3, ANSWER: 1.0, CONTINUATION: 1.0}
"""What predicting a token is worth. A server never drafts the template's tokens, nor the user's; the latter are text of
the target's own nevertheless."""
_OPEN_ROWS = 256
_PADDING = -1


@dataclass(frozen=True, slots=True)
class Packed:
    """R rows of L tokens: `ids` int32, `kinds` uint8, `documents` int32 (which one; -1 for padding), `positions` int32
    within the document; [R, L] each."""

    ids: NDArray[np.int32]
    kinds: NDArray[np.uint8]
    documents: NDArray[np.int32]
    positions: NDArray[np.int32]

    @property
    def num_rows(self) -> int:
        return int(self.ids.shape[0])


def pack(documents: Sequence[Document], length: int) -> Packed:
    """Best fit into rows that are still open, documents in order; longer ones than `length` lose their end."""
    rows: list[list[int]] = []
    free: list[int] = []
    open_rows: list[int] = []
    for i, document in enumerate(documents):
        size = min(len(document.ids), length)
        fitting = [r for r in open_rows if free[r] >= size]
        if fitting:
            row = min(fitting, key=lambda r: free[r])
        else:
            row = len(rows)
            rows.append([])
            free.append(length)
            open_rows.append(row)
        rows[row].append(i)
        free[row] -= size
        if len(open_rows) > _OPEN_ROWS or free[row] < 8:
            open_rows.remove(min(open_rows, key=lambda r: free[r]))
    return _filled(rows, documents, length)


def _filled(rows: list[list[int]], documents: Sequence[Document], length: int) -> Packed:
    shape = (len(rows), length)
    packed = Packed(
        np.zeros(shape, np.int32),
        np.zeros(shape, np.uint8),
        np.full(shape, _PADDING, np.int32),
        np.zeros(shape, np.int32),
    )
    for r, members in enumerate(rows):
        at = 0
        for i in members:
            ids = documents[i].ids[:length]
            part = slice(at, at + len(ids))
            packed.ids[r, part], packed.kinds[r, part] = ids, documents[i].kinds[:length]
            packed.documents[r, part], packed.positions[r, part] = i, np.arange(len(ids))
            at += len(ids)
    return packed


@dataclass(frozen=True, slots=True)
class Chains:
    """Chains whose step s predicts something: `start` [n] int64 flat index of the position t, `weights` [n] float32."""

    start: Tensor
    weights: Tensor


@dataclass(frozen=True, slots=True)
class Batch:
    """B rows of L tokens on the device: `ids`, `positions`, `documents` [B, L] int64; `chains` one a step.

    Document i of the flattened rows is tokens offsets[i] … offsets[i + 1] - 1, `offsets` [D + 1] int32, and no longer
    than `longest`; a row's padding counts as one.
    """

    ids: Tensor
    positions: Tensor
    documents: Tensor
    chains: tuple[Chains, ...]
    offsets: Tensor
    longest: int

    @property
    def begins(self) -> Tensor:
        """[B, L] bool: the first token of a document."""
        return self.positions == 0

    def sees(self) -> Tensor:
        """[B, L, L] bool: what is before a token or is itself, and of its document."""
        length = self.ids.shape[1]
        same = self.documents[:, :, None] == self.documents[:, None, :]
        return same & torch.ones(length, length, dtype=torch.bool, device=self.ids.device).tril_()


def make_batch(packed: Packed, rows: NDArray[np.int64], steps: int, device: torch.device) -> Batch:
    """Rows as a batch. Step s of the chain at t predicts token t + s + 1, if that is of the same document and worth
    anything."""
    documents, kinds = packed.documents[rows], packed.kinds[rows]
    value = np.array([KIND_WEIGHTS[k] for k in range(len(KIND_WEIGHTS))], np.float32)[kinds]
    value[documents == _PADDING] = 0.0
    length = documents.shape[1]
    chains = []
    for s in range(steps):
        weights = np.zeros_like(value)
        ahead = min(s + 1, length)
        same = documents[:, ahead:] == documents[:, : length - ahead]
        weights[:, : length - ahead] = value[:, ahead:] * same
        start = np.flatnonzero(weights)
        chains.append(Chains(_move(start, device), _move(weights.ravel()[start], device)))
    ids, positions = (_move(x[rows].astype(np.int64), device) for x in (packed.ids, packed.positions))
    offsets = _offsets(documents)
    longest = int(np.diff(offsets).max())
    moved = _move(documents.astype(np.int64), device)
    return Batch(ids, positions, moved, tuple(chains), _move(offsets, device), longest)


def _offsets(documents: NDArray[np.int32]) -> NDArray[np.int32]:
    """Where the documents of the flattened rows begin, and where the last one ends."""
    begins = np.ones(documents.shape, bool)
    begins[:, 1:] = documents[:, 1:] != documents[:, :-1]
    return np.append(np.flatnonzero(begins), documents.size).astype(np.int32)


def _move(array: NDArray[np.generic], device: torch.device) -> Tensor:
    tensor = torch.from_numpy(np.ascontiguousarray(array))
    return tensor.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else tensor


class Order:
    """Which rows a batch takes: every epoch all of them once, in an order that seed and epoch fix."""

    def __init__(self, num_rows: int, batch_rows: int, seed: int) -> None:
        self.num_rows, self.batch_rows, self.seed = num_rows, batch_rows, seed
        self.batches_per_epoch = max(1, num_rows // batch_rows)
        self._epoch = -1
        self._rows: NDArray[np.int64] = np.zeros(0, np.int64)

    def rows(self, index: int) -> NDArray[np.int64]:
        """Row numbers of batch `index`, counted from the start of the training."""
        epoch, at = divmod(index, self.batches_per_epoch)
        if epoch != self._epoch:
            generator = np.random.default_rng([self.seed & (2**63 - 1), epoch])
            self._epoch, self._rows = epoch, generator.permutation(self.num_rows).astype(np.int64)
        return np.resize(self._rows, max(self.num_rows, self.batch_rows))[at * self.batch_rows :][: self.batch_rows]
