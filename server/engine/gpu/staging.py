"""Transfers that nobody waits for: rings of pinned host buffers beside one static device buffer.

A pinned buffer is never written while the device may still read it, nor read before the device has written it. Two
steps are under way at most (one runs, one is being read), so three buffers are enough:

    step n      upload 0 -> inputs    A, B    results -> download 0    event
    step n + 1  upload 1 -> inputs    A, B    results -> download 1    event
    step n + 2  upload 2: step n - 1 was read before step n + 1 was launched
"""

from __future__ import annotations

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

_RING = 3


class Upload:
    """`size` int64 that the host fills and sends each step; `device` [size] is where graphs read them."""

    def __init__(self, size: int, device: torch.device) -> None:
        pinned = device.type == "cuda"
        self.device = torch.zeros(size, dtype=torch.int64, device=device)
        self._ring = [torch.zeros(size, dtype=torch.int64, pin_memory=pinned) for _ in range(_RING)]
        self._views = [buffer.numpy() for buffer in self._ring]
        self._next = 0

    def begin(self) -> NDArray[np.int64]:
        """The next buffer, with whatever it held before."""
        return self._views[self._next]

    def send(self, size: int) -> None:
        """Copies the first `size` integers of the buffer that `begin` gave, in stream order."""
        self.device[:size].copy_(self._ring[self._next][:size], non_blocking=True)
        self._next = (self._next + 1) % _RING


class BulkUpload:
    """Up to `size` int64 at a time, several times a step; `device` holds the last ones sent.

    Pinned once: memory of a size that the caching host allocator has not seen costs a `cudaHostAlloc`, which takes
    long and may wait for the device. Copies lie behind the step that runs, so the `num_buffers` + 1st `begin` of a
    step waits for its end; those of the step before are through by then.
    """

    def __init__(self, size: int, num_buffers: int, device: torch.device) -> None:
        pinned = device.type == "cuda"
        self.size, self.num_buffers = size, num_buffers
        self.device = torch.zeros(size, dtype=torch.int64, device=device)
        self._ring = [torch.zeros(size, dtype=torch.int64, pin_memory=pinned) for _ in range(num_buffers)]
        self._views = [buffer.numpy() for buffer in self._ring]
        self._read = [torch.cuda.Event() for _ in range(num_buffers)] if pinned else []
        self._next = 0

    def begin(self) -> NDArray[np.int64]:
        """The next buffer, with whatever it held before."""
        if self._read:
            self._read[self._next].synchronize()  # at once if it was never recorded
        return self._views[self._next]

    def send(self, size: int) -> Tensor:
        """The first `size` integers of the buffer that `begin` gave, on the device until the next `send`."""
        sent = self.device[:size]
        sent.copy_(self._ring[self._next][:size], non_blocking=True)
        if self._read:
            self._read[self._next].record()
        self._next = (self._next + 1) % self.num_buffers
        return sent


class Download:
    """`source` is a static device tensor; `fetch` copies its beginning into the next pinned buffer."""

    def __init__(self, source: Tensor) -> None:
        pinned = source.is_cuda
        self.source = source
        self._ring = [torch.zeros(source.shape, dtype=source.dtype, pin_memory=pinned) for _ in range(_RING)]
        self._next = 0

    def fetch(self, size: int) -> Tensor:
        """The host tensor [size] that will hold the values once the stream has got that far."""
        buffer = self._ring[self._next][:size]
        buffer.copy_(self.source[:size], non_blocking=True)
        self._next = (self._next + 1) % _RING
        return buffer
