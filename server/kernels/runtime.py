"""What every kernel's launcher asks: the interpreter or a GPU, how many multiprocessors, how exact is a dot."""

from __future__ import annotations

import os
from functools import lru_cache

import torch

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
"""Kernels run on CPU tensors under Triton's interpreter; set before the first kernel module is imported."""

_INTERPRETED_SMS = 4
_HOPPER = (9, 0)


def next_power_of_2(n: int) -> int:
    """The smallest power of two that is at least `n` (1 for 0)."""
    return 1 << max(0, n - 1).bit_length()


def ceil_div(a: int, b: int) -> int:
    """`a / b`, rounded up."""
    return -(-a // b)


def dot_precision(dtype: torch.dtype) -> str:
    """`input_precision` of `tl.dot`: float32 operands are multiplied as float32, never as TF32."""
    return "ieee" if dtype == torch.float32 else "tf32"


@lru_cache(maxsize=16)
def num_sms(device: torch.device) -> int:
    """Streaming multiprocessors of a GPU; a handful under the interpreter, so that its tests see several waves."""
    if device.type != "cuda":
        return _INTERPRETED_SMS
    return int(torch.cuda.get_device_properties(device).multi_processor_count)


@lru_cache(maxsize=16)
def supports_pdl(device: torch.device) -> bool:
    """Whether kernels may overlap with the end of the one before (programmatic dependent launch, from Hopper on)."""
    return device.type == "cuda" and torch.cuda.get_device_capability(device) >= _HOPPER and _PDL_WANTED


_PDL_WANTED = os.environ.get("OUTPACE_PDL", "1") == "1"


def pdl_options(device: torch.device) -> dict[str, bool]:
    """Launch arguments of a kernel that has a `PDL` switch: programmatic dependent launch where it is supported."""
    return {"PDL": True, "launch_pdl": True} if supports_pdl(device) else {"PDL": False}
