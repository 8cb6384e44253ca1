"""Argmax in pieces: what the programs of one position find is put together by the last of them to arrive.

A piece is one int64: an order-preserving code of the float32 score above, the complement of the token id below, so that
the largest piece is the largest score and, among equals, the lowest id. The result does not depend on how many pieces
there are.
"""

from __future__ import annotations

from functools import lru_cache

import torch
import triton
import triton.language as tl
from torch import Tensor

from server.kernels import runtime

BLOCK = 64 if runtime.INTERPRETED else 2048
"""Logits a program looks at at once."""
WARPS = 8
_PROGRAMS_PER_SM = 2 if runtime.INTERPRETED else 8
"""Several waves of small programs: of one wave and a bit, the bit takes as long as the wave."""
_NUM_COUNTERS = 1 << 16


@triton.jit
def ordered(x):  # type: ignore[no-untyped-def]
    """int32 code of float32 `x` with the same order; -0.0 counts as 0.0."""
    bits = tl.where(x == 0.0, 0.0, x).to(tl.int32, bitcast=True)
    return bits ^ ((bits >> 31) & 0x7FFFFFFF)


@triton.jit
def unordered(code):  # type: ignore[no-untyped-def]
    """The float32 whose `ordered` code this is."""
    return (code ^ ((code >> 31) & 0x7FFFFFFF)).to(tl.float32, bitcast=True)


@triton.jit
def pack(score, token):  # type: ignore[no-untyped-def]
    """Piece (int64) of a float32 score and an int32 token id."""
    return (ordered(score).to(tl.int64) << 32) | (0x7FFFFFFF - token).to(tl.int64)


@triton.jit
def token_of(piece):  # type: ignore[no-untyped-def]
    """Token id (int64) of a piece."""
    return 0x7FFFFFFF - (piece & 0xFFFFFFFF)


@triton.jit
def best_of(score, token):  # type: ignore[no-untyped-def]
    """Piece of the best of a block of float32 scores (no NaN) and int32 token ids."""
    top = tl.max(score, 0)
    return pack(top, tl.min(tl.where(score == top, token, 0x7FFFFFFF), 0))


@triton.jit
def is_last(counter, expected):  # type: ignore[no-untyped-def]
    """Whether this program is the last of `expected` to arrive at `counter`, which is then 0 again.

    What the others stored before they arrived may be read, past the L1 cache (`.cg`).
    """
    tl.debug_barrier()  # every thread's stores come before the one thread that counts
    last = tl.atomic_add(counter, 1, sem="acq_rel") == expected - 1
    if last:
        tl.store(counter, 0)
    return last


def chunks(num_positions: int, vocab_size: int, device: torch.device, block: int = BLOCK) -> tuple[int, int, int]:
    """How a position's vocabulary is shared out: programs, blocks of each, and the power of two that bounds the former.

    One position is spread over many multiprocessors; many positions take few programs each.
    """
    num_blocks = runtime.ceil_div(vocab_size, block)
    wanted = runtime.ceil_div(_PROGRAMS_PER_SM * runtime.num_sms(device), max(1, num_positions))
    per_chunk = runtime.ceil_div(num_blocks, max(1, min(num_blocks, wanted)))
    return runtime.ceil_div(num_blocks, per_chunk), per_chunk, runtime.next_power_of_2(num_blocks)


@lru_cache(maxsize=16)
def _counters(device: torch.device) -> Tensor:
    if device.type == "cuda" and torch.cuda.is_current_stream_capturing():
        raise RuntimeError("run a step before capturing one: counters cannot be made inside a graph")
    return torch.zeros(_NUM_COUNTERS, dtype=torch.int32, device=device)


def counters(num: int, device: torch.device) -> Tensor:
    """`num` int32 counters that are 0 between kernels; shared by all of them, so steps must not overlap on a device.

    ValueError: more than there are. RuntimeError: first asked for while a graph is captured.
    """
    if num > _NUM_COUNTERS:
        raise ValueError(f"counters: {num} is not valid; use at most {_NUM_COUNTERS}")
    return _counters(device)


def argmax_reference(scores: Tensor) -> Tensor:
    """Lowest id [T] int64 of each row's largest score; `scores` [T, V], no NaN."""
    ids = torch.arange(scores.shape[1], device=scores.device)
    is_best = scores == scores.amax(1, keepdim=True)
    return torch.where(is_best, ids, scores.shape[1]).amin(1)
