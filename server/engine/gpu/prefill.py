"""Prompt chunks for the device: everything that the host knows of them, in one upload."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from server.core import Request, RowPlan, SamplingParams
from server.engine.gpu.state import DeviceState
from server.engine.sequence import Sequence
from server.kernels.paged import PagedRows


@dataclass(frozen=True, slots=True)
class Layout:
    """Where the parts of N tokens in R rows, T of which get logits, lie in one buffer of int64."""

    token_ids: slice
    positions: slice
    places: slice
    slots: slice
    starts: slice
    offsets: slice
    logits_at: slice

    @classmethod
    def of(cls, num_tokens: int, num_rows: int, num_logits: int) -> Layout:
        """Every part begins at a multiple of 16 bytes: kernels are compiled anew for pointers that do not."""
        parts, at = [], 0
        for size in (num_tokens, num_tokens, num_tokens, num_rows, num_rows, num_rows + 1, num_logits):
            parts.append(slice(at, at + size))
            at += size + size % 2
        return cls(*parts)

    @property
    def size(self) -> int:
        return int(self.logits_at.stop)


@dataclass(slots=True)
class Chunks:
    """The rows of a prefill step on the host; `logits_at` [T] are those of their tokens whose logits are wanted.

    `lengths` [R] and `ends` [R], each row's last token among all of them.
    """

    rows: list[RowPlan]
    sequences: list[Sequence]
    lengths: NDArray[np.int64]
    ends: NDArray[np.int64]
    logits_at: NDArray[np.int64]

    @classmethod
    def of(cls, rows: list[RowPlan], sequences: list[Sequence]) -> Chunks:
        """The chunks of `rows`; first tokens are wanted of those that end their prompts."""
        lengths = np.array([row.num_tokens for row in rows], dtype=np.int64)
        ends = lengths.cumsum() - 1
        return cls(rows, sequences, lengths, ends, ends[[row.samples for row in rows]])

    @property
    def num_tokens(self) -> int:
        return int(self.ends[-1]) + 1

    @property
    def num_rows(self) -> int:
        return len(self.rows)

    @property
    def num_logits(self) -> int:
        return len(self.logits_at)

    def fill(self, buffer: NDArray[np.int64], layout: Layout, block_size: int, nobody: int) -> None:
        """Writes everything to `buffer`, whose layout may have room for more.

        Padding tokens have id and position 0 and are kept at place 0, which is nobody's; padding rows are slot
        `nobody`'s and have no tokens.
        """
        tokens, positions, places = buffer[layout.token_ids], buffer[layout.positions], buffer[layout.places]
        first = 0
        for row, seq in zip(self.rows, self.sequences, strict=True):
            end, behind = row.start + row.num_tokens, first + row.num_tokens
            tokens[first:behind] = seq.token_ids[row.start : end]
            at = np.arange(row.start, end)
            skipped = row.start // block_size
            blocks = np.asarray(seq.blocks[skipped : -(-end // block_size)], dtype=np.int64)
            positions[first:behind] = at
            places[first:behind] = blocks[at // block_size - skipped] * block_size + at % block_size
            first = behind
        for part in (tokens, positions, places):
            part[first:] = 0
        _fill(buffer[layout.slots], [seq.slot for seq in self.sequences], nobody)
        _fill(buffer[layout.starts], [row.start for row in self.rows], 0)
        _fill(buffer[layout.offsets], [0, *(self.ends + 1)], first)
        _fill(buffer[layout.logits_at], self.logits_at, 0)


def nobodys_chunks(num_tokens: int, nobody: int, state: DeviceState) -> Chunks:
    """Chunks of `num_tokens` tokens in rows of slot `nobody` that read and write block 0 only: to warm up."""
    rows, owners = [], []
    for first in range(0, num_tokens, state.max_context):
        length = min(num_tokens - first, state.max_context)
        owner = Sequence(Request("warm-up", [0] * length, SamplingParams()), [0] * length, slot=nobody)
        owner.blocks = [0] * -(-length // state.block_size)
        rows.append(RowPlan(nobody, 0, length, True))
        owners.append(owner)
    return Chunks.of(rows, owners)


def _fill(part: NDArray[np.int64], values: NDArray[np.int64] | list[int], padding: int) -> None:
    part[: len(values)] = values
    part[len(values) :] = padding


@dataclass(slots=True)
class Inputs:
    """Chunks on the device: `token_ids`, `positions` and `places` in the pool are [N] int64, `logits_at` [T]."""

    token_ids: Tensor
    positions: Tensor
    places: Tensor
    logits_at: Tensor
    rows: PagedRows


def inputs_in(packed: Tensor, layout: Layout, state: DeviceState, chunks: Chunks | None = None) -> Inputs:
    """Views of the buffer `packed`: of what `chunks` take up, or of all there is room for, padding included.

    What chunks see before themselves is in the pool, or will be by then.
    """
    token_ids, positions, places = packed[layout.token_ids], packed[layout.positions], packed[layout.places]
    slots, starts, logits_at = packed[layout.slots], packed[layout.starts], packed[layout.logits_at]
    offsets = packed[layout.offsets]
    widest, longest = len(token_ids), state.max_context
    if chunks is not None:
        num_tokens, num_rows = chunks.num_tokens, chunks.num_rows
        token_ids, positions, places = token_ids[:num_tokens], positions[:num_tokens], places[:num_tokens]
        slots, starts, logits_at = slots[:num_rows], starts[:num_rows], logits_at[: chunks.num_logits]
        offsets = offsets[: num_rows + 1]
        widest, longest = int(chunks.lengths.max()), max(row.start + row.num_tokens for row in chunks.rows)
    rows = PagedRows(
        slots=slots,
        starts=starts,
        block_tables=state.block_tables,
        block_size=state.block_size,
        max_context=longest,
        offsets=offsets.to(torch.int32),
        max_width=widest,
    )
    return Inputs(token_ids, positions, places, logits_at, rows)
