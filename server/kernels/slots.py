"""How a row samples, read by the slot it names: the resident tables of `server.sampling.state`, not gathered first.

`floats` [S, 6] float32: temperature (above 0, also of greedy slots), top_p, min_p, repetition, presence and frequency
penalty. `ints` [S, 5] int64: top_k (the vocabulary's size: off), seed, choice, greedy, min_tokens. Both contiguous.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from server.kernels.noise import noise_key

NUM_FLOATS, NUM_INTS = 6, 5
_F, _I = tl.constexpr(NUM_FLOATS), tl.constexpr(NUM_INTS)


@triton.jit
def temperature_of(floats, slot):  # type: ignore[no-untyped-def]
    """Temperature (float32) of an int64 slot."""
    return tl.load(floats + slot * _F)


@triton.jit
def is_greedy(ints, slot):  # type: ignore[no-untyped-def]
    """Whether a slot takes the most probable token."""
    return tl.load(ints + slot * _I + 3) != 0


@triton.jit
def filters_of(floats, ints, slot):  # type: ignore[no-untyped-def]
    """top_k (int64), top_p and min_p (float32) of a slot."""
    return tl.load(ints + slot * _I), tl.load(floats + slot * _F + 1), tl.load(floats + slot * _F + 2)


@triton.jit
def penalties_of(floats, slot):  # type: ignore[no-untyped-def]
    """Repetition, presence and frequency penalty (float32) of an int64 slot."""
    return tl.load(floats + slot * _F + 3), tl.load(floats + slot * _F + 4), tl.load(floats + slot * _F + 5)


@triton.jit
def min_tokens_of(ints, slot):  # type: ignore[no-untyped-def]
    """How long (int64) a slot's output must be before it may end."""
    return tl.load(ints + slot * _I + 4)


@triton.jit
def key_of(ints, slot, position, PURPOSE: tl.constexpr):  # type: ignore[no-untyped-def]
    """`noise_key` of a slot's seed and choice at int64 `position`."""
    return noise_key(tl.load(ints + slot * _I + 1), tl.load(ints + slot * _I + 2), position, PURPOSE)


def as_tables(
    temperature: Tensor,
    greedy: Tensor,
    seeds: Tensor,
    choices: Tensor,
    top_k: Tensor | None = None,
    top_p: Tensor | None = None,
    min_p: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Slots [R], floats [R, 6] and ints [R, 5] of parameters that are at hand by row, each [R]: row r has slot r."""
    num_rows = temperature.shape[0]
    slots = torch.arange(num_rows, device=temperature.device)
    floats = torch.zeros(num_rows, NUM_FLOATS, dtype=torch.float32, device=temperature.device)
    ints = torch.zeros(num_rows, NUM_INTS, dtype=torch.int64, device=temperature.device)
    for column, values in enumerate((temperature, top_p, min_p)):
        if values is not None:
            floats[:, column] = values
    for column, numbers in enumerate((top_k, seeds, choices, greedy)):
        if numbers is not None:
            ints[:, column] = numbers
    return slots, floats, ints
