"""A verify step as the device sees it: static tensors that captured graphs read and write. R rows, k drafts a row.

Nothing here is known to the host when a step is launched; the host holds upper bounds only.
"""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from server.spec.types import SlotState

TEMPERATURE, TOP_P, MIN_P, REPETITION, PRESENCE, FREQUENCY = range(6)
"""Columns of the float table."""
TOP_K, SEED, CHOICE, GREEDY, MIN_TOKENS = range(5)
"""Columns of the integer table."""


@dataclass(slots=True)
class CachedDrafts:
    """What a prefix hit has brought to A sequences: [A] int64 each.

    Their first `end` tokens need not run (0: no hit). Of those, the drafter's own keys and values are right from
    position `first` on; none are where `first` == `end`. `last_block` holds token `end` - 1 (0 without a hit).
    """

    first: Tensor
    end: Tensor
    last_block: Tensor


@dataclass(slots=True)
class DeviceStep:
    """What a drafter may read inside a graph, for R rows (padding rows included: they name the last slot).

    `slots` [R] int64; `limits` [R] int64 is the most drafts each row may get (at most k; 0: none). `state`,
    `block_tables` [S, NB] int32 and how a slot samples, `floats` [S, 6] float32 and `ints` [S, 5] int64
    (`server.sampling.state`), are by slot: gather by `slots`; so are, where there are any, `bias_ids` [S, B] int64,
    `bias_values` [S, B] float32 and `end_ids` [S, E] int64, which only verification reads. `uploads` [R, U] int64 is
    what the host-side part of the drafter sent for this step (U = `DeviceDrafter.upload_width(k)`), None if that is 0.
    `max_context` is the host's static bound of a row's known tokens, `block_size` the tokens of a block.
    """

    slots: Tensor
    limits: Tensor
    state: SlotState
    block_tables: Tensor
    floats: Tensor
    ints: Tensor
    uploads: Tensor | None
    max_context: int
    block_size: int
    bias_ids: Tensor | None = None
    bias_values: Tensor | None = None
    end_ids: Tensor | None = None

    @property
    def num_rows(self) -> int:
        return self.slots.shape[0]

    @property
    def temperature(self) -> Tensor:
        """Of each row, [R] float32; 1 for greedy ones."""
        return self.floats[:, TEMPERATURE].index_select(0, self.slots)

    @property
    def seeds(self) -> Tensor:
        """Of each row, [R] int64."""
        return self.ints[:, SEED].index_select(0, self.slots)

    @property
    def choices(self) -> Tensor:
        """Of each row, [R] int64."""
        return self.ints[:, CHOICE].index_select(0, self.slots)

    @property
    def greedy(self) -> Tensor:
        """Of each row, [R] bool."""
        return self.ints[:, GREEDY].index_select(0, self.slots) != 0
