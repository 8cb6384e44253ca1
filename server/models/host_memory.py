"""Large zeroed tensors in host memory without waiting for their pages.

The system hands out zeroed pages when they are first written. To zero them once more before an engine starts would
only make it wait: seconds for each few GiB. A thread of low priority asks for them meanwhile, so that memory that was
promised is there before a request needs it.
"""

from __future__ import annotations

import ctypes
import mmap
import os
import threading
from collections.abc import Sequence
from math import prod

import torch
from torch import Tensor

LARGE_BYTES = 64 << 20
"""From here on a tensor is not zeroed by hand."""
_CHUNK_BYTES = 1 << 20  # whoever maps memory meanwhile waits for one of them
_POPULATE_WRITE = 23  # MADV_POPULATE_WRITE of Linux 5.14; an older kernel refuses it, and pages come when written
_LOWEST_PRIORITY = 19


def zeros(shape: Sequence[int], dtype: torch.dtype) -> Tensor:
    """A tensor of zeros on the CPU."""
    num_bytes = prod(shape) * dtype.itemsize
    if num_bytes < LARGE_BYTES:
        return torch.zeros(*shape, dtype=dtype)
    memory = mmap.mmap(-1, num_bytes, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    threading.Thread(target=_populate, args=(memory, num_bytes), name="host-memory", daemon=True).start()
    return torch.frombuffer(memory, dtype=torch.uint8).view(dtype).view(*shape)


def _populate(memory: mmap.mmap, num_bytes: int) -> None:
    """Gives the pages to the process; what is in them stays."""
    os.setpriority(os.PRIO_PROCESS, threading.get_native_id(), _LOWEST_PRIORITY)
    madvise = ctypes.CDLL(None, use_errno=True).madvise  # mmap's own method keeps the interpreter's lock
    madvise.argtypes = (ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int)
    start = ctypes.addressof(ctypes.c_char.from_buffer(memory))
    for offset in range(0, num_bytes, _CHUNK_BYTES):
        if madvise(start + offset, min(_CHUNK_BYTES, num_bytes - offset), _POPULATE_WRITE):
            return
