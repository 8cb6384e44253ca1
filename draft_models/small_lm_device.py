"""A small language model as drafter, all of it in the step's graphs (Leviathan et al. 2023; Chen et al. 2023).

A chain's first pass runs the last two known tokens of every row, since the last draft of a fully accepted chain was
never fed. Keys and values of other accepted drafts are right already; those of rejected ones are overwritten.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import accumulate

import torch
from torch import Tensor

from draft_models.eagle3_chain import (
    ChainShape,
    DeviceOnly,
    Sampler,
    as_drafts,
    chunk_positions,
    rows_from,
)
from server.kernels.paged import PagedRows, chain_ends, places
from server.models.base import KVLayer
from server.models.paged_forward import PagedForward
from server.models.paging import make_pools
from server.spec.device import DeviceStep
from server.spec.types import Drafts, Verdict
from server.spec.upload import to_device

WINDOW = 2
CATCH_UP_CHUNK = 2048
"""Tokens a pass when a long gap has to be computed, so that its activations stay small."""


@dataclass(frozen=True, slots=True)
class Gap:
    """What `slot` lacks from position `start` on; `known` are all of its tokens up to the gap's end."""

    slot: int
    start: int
    known: Sequence[int]


def in_chunks(gaps: Sequence[Gap], size: int) -> Iterator[list[Gap]]:
    """The same tokens in the same order, `size` at a time; a slot is in a chunk once at most."""
    chunk: list[Gap] = []
    room = size
    for gap in gaps:
        start = gap.start
        while start < len(gap.known):
            part = Gap(gap.slot, start, gap.known[: start + room])
            chunk.append(part)
            room -= len(part.known) - start
            start = len(part.known)
            if room == 0:
                yield chunk
                chunk, room = [], size
    if chunk:
        yield chunk


class SmallLMDeviceDrafter(DeviceOnly):
    """Implements draft_models.protocol.DeviceDrafter. What blocks of a prefix hit lack, `resume` computes too."""

    name = "small-lm"
    feature_layers: tuple[int, ...] = ()
    has_distribution = True

    def __init__(
        self,
        forward: PagedForward,
        kv_layers: Sequence[KVLayer],
        dtype: torch.dtype,
        device: torch.device,
        shape: ChainShape,
        sampler: Sampler,
    ) -> None:
        self.forward, self.shape, self.sampler, self.device = forward, shape, sampler, device
        self.pools = make_pools(kv_layers, shape.num_blocks * shape.block_size, dtype, device)
        self._block_tables: Tensor | None = None

    def bind(self, block_tables: Tensor) -> None:
        """The runner's `block_tables` [S, NB], which `resume` needs before the first step has shown them."""
        self._block_tables = block_tables

    # -- in the step ---------------------------------------------------------------------------------------

    def draft(self, step: DeviceStep, k: int) -> Drafts:
        """See DeviceDrafter. ValueError: k is not 1 to the shape's `max_draft_tokens`."""
        if not 1 <= k <= self.shape.max_draft_tokens:
            raise ValueError(f"k: {k!r} is not valid; use 1 to {self.shape.max_draft_tokens}")
        self.bind(step.block_tables)
        known = step.state.num_tokens[step.slots]
        ends, end_places = chain_ends(step.block_tables, step.slots, known, step.limits, step.block_size, k)
        tokens: list[Tensor] = []
        probs: list[Tensor] = []
        logits = self._first(step, known, k)
        each = torch.arange(step.num_rows, device=known.device)
        for j in range(k):
            if j > 0:  # draft j lies at the position before the one that is drafted now
                rows = rows_from(step, ends[j], 1, k - 1)
                logits, _ = self.forward(tokens[-1], self.pools, rows, ends[j], end_places[j], each, ())
            token, q = self.sampler(logits, step, ends[j + 1], None)
            tokens.append(token)
            if q is not None:
                probs.append(q)
        return as_drafts(tokens, probs, step)

    def _first(self, step: DeviceStep, known: Tensor, k: int) -> Tensor:
        """Logits [R, V] behind each row's last known token. A row of one token runs a second, which it ignores."""
        starts = (known - WINDOW).clamp(min=0)
        positions = starts[:, None] + torch.arange(WINDOW, device=known.device)
        tokens = step.state.history[step.slots[:, None], positions]
        at = places(step.block_tables, step.slots, positions, step.block_size, positions < known[:, None])
        last = torch.arange(WINDOW - 1, WINDOW * step.num_rows, WINDOW, device=known.device) - (WINDOW - known).clamp(
            min=0
        )
        rows = rows_from(step, starts, WINDOW, k - 1)
        logits, _ = self.forward(tokens.view(-1), self.pools, rows, positions.view(-1), at.view(-1), last, ())
        return logits

    def after_verify(self, step: DeviceStep, drafts: Drafts, verdict: Verdict, features: Tensor | None) -> None:
        """Nothing to do: keys and values of accepted drafts are those of the tokens they are."""

    def prefill_chunk(self, step: DeviceStep, token_ids: Tensor, rows: PagedRows, features: Tensor | None) -> None:
        """Runs the same chunk."""
        self.bind(rows.block_tables)
        self._run(token_ids, rows)

    def resume(self, slots: Sequence[int], known: Sequence[Sequence[int]], seen: Sequence[int]) -> None:
        """Computes what the slots lack, together. RuntimeError: the block tables were never seen (see `bind`).

        Of the tokens known behind a chain, all but the last two certainly lie where it has been.
        """
        if self._block_tables is None:
            raise RuntimeError("resume came before any step: bind the block tables first")
        gaps = [Gap(*row) for row in zip(slots, (max(0, n - WINDOW) for n in seen), known, strict=True)]
        for chunk in in_chunks(gaps, CATCH_UP_CHUNK):
            self._catch_up(chunk, self._block_tables)

    # -- prompt chunks -------------------------------------------------------------------------------------

    def _catch_up(self, gaps: list[Gap], block_tables: Tensor) -> None:
        tokens = [token for gap in gaps for token in gap.known[gap.start :]]
        ends = list(accumulate((len(gap.known) - gap.start for gap in gaps), initial=0))
        numbers = (tokens, [gap.slot for gap in gaps], [gap.start for gap in gaps], ends)
        uploaded = to_device([number for part in numbers for number in part], self.device)
        token_ids, slots, starts, offsets = uploaded.split([len(part) for part in numbers])
        rows = PagedRows(
            slots=slots,
            starts=starts,
            block_tables=block_tables,
            block_size=self.shape.block_size,
            max_context=max(len(gap.known) for gap in gaps),
            offsets=offsets.to(torch.int32),
            max_width=max(len(gap.known) - gap.start for gap in gaps),
        )
        self._run(token_ids, rows)

    def _run(self, token_ids: Tensor, rows: PagedRows) -> None:
        positions, at, last = chunk_positions(rows, token_ids.shape[0])
        # One row of logits that nobody reads: kernels want at least one.
        self.forward(token_ids, self.pools, rows, positions, at, last[:1], ())
