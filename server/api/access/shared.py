"""Memory that the API processes share: one row a worker, written by that worker only, read by all.

No locks: a number is one aligned machine word, so a reader sees it before or after a write, never half of one.
"""

from __future__ import annotations

import mmap
import os
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray


def create(path: str | Path, num_bytes: int) -> None:
    """A new file of zeros, readable by this user only. It is sparse: only pages that are written take memory."""
    descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC, 0o600)
    try:
        os.ftruncate(descriptor, num_bytes)
    finally:
        os.close(descriptor)


def attach(path: str | Path | None, shape: tuple[int, ...], dtype: type[np.generic]) -> NDArray[Any]:
    """The file as an array; without a file memory of this process (and of those forked from it).

    The mapping lives as long as the array. Raises ValueError where the file was made for another shape.
    """
    num_bytes = int(np.prod(shape)) * np.dtype(dtype).itemsize
    if path is None:
        return np.frombuffer(mmap.mmap(-1, num_bytes), dtype).reshape(shape)
    descriptor = os.open(path, os.O_RDWR | os.O_CLOEXEC)
    try:
        size = os.fstat(descriptor).st_size
        if size != num_bytes:
            raise ValueError(f"{path}: has {size} bytes, not {num_bytes}; it was made for other numbers of workers")
        return np.frombuffer(mmap.mmap(descriptor, num_bytes), dtype).reshape(shape)
    finally:
        os.close(descriptor)
