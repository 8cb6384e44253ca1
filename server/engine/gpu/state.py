"""Everything on the device that outlives a step: per-slot tensors, block tables, the KV pool."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from server.engine.limits import MAX_BIASES, MAX_ENDS
from server.engine.step_runner import RunnerShape
from server.sampling.state import SamplingState
from server.spec.device import DeviceStep
from server.spec.types import SlotState


@dataclass(slots=True)
class DeviceState:
    """S slots, the last of which is nobody's: padding rows name it. `max_context` bounds a slot's known tokens."""

    slots: SlotState
    block_tables: Tensor
    sampling: SamplingState
    pools: list[Tensor]
    block_size: int
    max_context: int

    def step(self, slots: Tensor, limits: Tensor, uploads: Tensor | None) -> DeviceStep:
        """A step of the rows in `slots` [R]."""
        floats, ints, bias_ids, bias_values, end_ids = self.sampling.tables()
        return DeviceStep(
            slots,
            limits,
            self.slots,
            self.block_tables,
            floats,
            ints,
            uploads,
            max_context=self.max_context,
            block_size=self.block_size,
            bias_ids=bias_ids,
            bias_values=bias_values,
            end_ids=end_ids,
        )


def make_state(pools: list[Tensor], shape: RunnerShape, vocab_size: int, device: torch.device) -> DeviceState:
    """Per-slot tensors, with one slot more than there are sequences: padding rows name it.

    A sequence that has ended on the host may run one step more, so there is room for two steps' tokens.
    """
    slots, length = shape.max_num_seqs + 1, shape.max_model_len + 2 * (shape.max_draft_tokens + 1) + 2
    state = SlotState(
        history=torch.zeros(slots, length, dtype=torch.int64, device=device),
        num_tokens=torch.ones(slots, dtype=torch.int64, device=device),
        prompt_len=torch.ones(slots, dtype=torch.int64, device=device),
    )
    table_len = -(-length // shape.block_size) + 1
    tables = torch.zeros(slots, table_len, dtype=torch.int32, device=device)
    sampling = SamplingState(slots, vocab_size, device)
    sampling.reserve(MAX_BIASES, MAX_ENDS)
    return DeviceState(state, tables, sampling, pools, shape.block_size, length)
