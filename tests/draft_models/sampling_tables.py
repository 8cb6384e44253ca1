"""How the slots of a made-up step sample."""

from __future__ import annotations

import torch
from torch import Tensor

from server.core import SamplingParams
from server.sampling.state import SamplingState


def sampling_tables(num_slots: int, temperature: float, device: torch.device | None = None) -> dict[str, Tensor]:
    """`floats` and `ints` of a DeviceStep: every slot at this temperature, with a seed of its own."""
    state = SamplingState(num_slots, 32, device or torch.device("cpu"))
    for slot in range(num_slots):
        state.set(slot, SamplingParams(temperature=temperature, seed=slot + 7), 0)
    floats, ints, *_ = state.tables()
    return {"floats": floats, "ints": ints}
