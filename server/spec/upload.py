"""Uploads outside of a step's own inputs. Nobody waits for them."""

from __future__ import annotations

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor


def to_device(values: NDArray[np.int64] | list[int], device: torch.device) -> Tensor:
    """A one-off upload of int64: the caching host allocator keeps the pinned copy until it has been read."""
    host = torch.as_tensor(values, dtype=torch.int64)
    return host.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else host.clone()
