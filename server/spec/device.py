"""A verify step as the device sees it: static tensors that captured graphs read and write. R rows, k drafts a row.

Nothing here is known to the host when a step is launched; the host holds upper bounds only.
"""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from server.spec.types import SlotState


@dataclass(slots=True)
class DeviceStep:
    """What a drafter may read inside a graph, for R rows (padding rows included: they name the last slot).

    `slots` [R] int64; `limits` [R] int64 is the most drafts each row may get (at most k; 0: none). `state` and
    `block_tables` [S, NB] int32 are by slot: gather by `slots`. `temperature` [R] float32 (1 for greedy rows), `greedy`
    [R] bool, `seeds` and `choices` [R] int64 say how a row samples. `uploads` [R, U] int64 is what the host-side part
    of the drafter sent for this step (U = `DeviceDrafter.upload_width(k)`), None if that is 0. `max_context` is the
    host's static bound of a row's known tokens, `block_size` the tokens of a block.
    """

    slots: Tensor
    limits: Tensor
    state: SlotState
    block_tables: Tensor
    temperature: Tensor
    greedy: Tensor
    seeds: Tensor
    choices: Tensor
    uploads: Tensor | None
    max_context: int
    block_size: int

    @property
    def num_rows(self) -> int:
        return self.slots.shape[0]
