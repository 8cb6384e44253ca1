"""Counter-based noise: a pure function of (seed, choice, position, purpose, target vocabulary id).

Nothing here keeps state, so the noise of a position is the same in whatever step, batch or order it is asked for.
That is what makes speculative output reproducible: verification at draft offset j sees the noise which plain decoding
would have seen j steps later. The construction follows Salmon et al. 2011, "Parallel random numbers: as easy as
1, 2, 3" (a counter is mixed, no state is advanced), with splitmix64 (Steele et al. 2014) for the key of a position and
a 32-bit multiply-xorshift hash for the token ids below it, all in integer tensor ops that wrap alike on CPU and CUDA.
"""

from __future__ import annotations

from functools import lru_cache

import torch
from torch import Tensor

TARGET, DRAFT, ACCEPT, RESIDUAL = range(4)
"""Purposes: independent streams. TARGET drives `coupled`; the other three are the draws of `ratio`."""

_NUM_PURPOSES = 4
_CHUNK_ELEMENTS = 98_304  # two working buffers of a chunk stay in a core's L2


def _signed(value: int, bits: int) -> int:
    """The two's-complement integer with these bits: torch has no unsigned arithmetic."""
    half = 1 << (bits - 1)
    return (value + half) % (1 << bits) - half


_GOLDEN64 = _signed(0x9E3779B97F4A7C15, 64)
_SPLITMIX = (
    (30, _signed(0xBF58476D1CE4E5B9, 64)),
    (27, _signed(0x94D049BB133111EB, 64)),
    (31, 1),
)
# Two finalisers of the multiply-xorshift family with low measured avalanche bias (Wellons, "hash prospector").
_ROUND_A = ((16, _signed(0x21F0AAAD, 32)), (15, _signed(0xD35A2D97, 32)), (15, 1))
_ROUND_B = ((16, _signed(0x7FEB352D, 32)), (15, _signed(0x846CA68B, 32)), (16, 1))


def _mix64(x: Tensor) -> Tensor:
    """splitmix64's output function, a bijection of int64. `x` is overwritten."""
    for shift, multiplier in _SPLITMIX:
        x ^= (x >> shift) & ((1 << (64 - shift)) - 1)  # the mask makes the arithmetic shift a logical one
        if multiplier != 1:
            x *= multiplier
    return x


def noise_keys(seeds: Tensor, choices: Tensor, positions: Tensor, purpose: int) -> Tensor:
    """Keys [T, 2] int32 of the noise at T positions; `seeds`, `choices`, `positions` are [T] int64.

    Each input is absorbed by a full 64-bit mix, so neighbouring seeds, choices or positions share nothing.
    """
    if not 0 <= purpose < _NUM_PURPOSES:
        raise ValueError(f"purpose: {purpose!r} is not valid; use 0 to {_NUM_PURPOSES - 1}")
    key = _mix64(seeds + _GOLDEN64)
    key ^= choices * _NUM_PURPOSES + purpose
    key = _mix64(key.add_(_GOLDEN64))
    key ^= positions
    key = _mix64(key.add_(_GOLDEN64))
    return key.view(torch.int32).view(-1, 2)


def uniform(keys: Tensor) -> Tensor:
    """Uniform noise [T] float64, strictly between 0 and 1; `keys` [T, 2] int32.

    52 bits and a half: the largest value, 1 - 2**-53, is still a float64, so rounding can not make it 1.
    """
    bits = (keys.contiguous().view(torch.int64).view(-1) >> 12) & ((1 << 52) - 1)
    return (bits.to(torch.float64) + 0.5) * 2.0**-52


def _mix32(x: Tensor, scratch: Tensor, rounds: tuple[tuple[int, int], ...]) -> None:
    for shift, multiplier in rounds:
        torch.bitwise_right_shift(x, shift, out=scratch)
        scratch.bitwise_and_((1 << (32 - shift)) - 1)
        x.bitwise_xor_(scratch)
        if multiplier != 1:
            x.mul_(multiplier)


def hash_ids(ids: Tensor) -> Tensor:
    """Well-mixed int32 per vocabulary id, of the shape of `ids` (any integer dtype)."""
    x = ids.to(torch.int32, copy=True)
    x.add_(_signed(0x9E3779B9, 32))
    _mix32(x, torch.empty_like(x), _ROUND_A)
    return x


@lru_cache(maxsize=16)
def _hash_vocabulary(vocab_size: int, device: torch.device) -> Tensor:
    return hash_ids(torch.arange(vocab_size, dtype=torch.int32, device=device))


def gumbel(keys: Tensor, vocab: int | Tensor) -> Tensor:
    """Standard Gumbel noise [T, V] float32 for `keys` [T, 2] int32.

    `vocab` is the vocabulary size, or the *target* vocabulary ids of the columns: [V], or [T, V] where each
    position has its own. A token's noise depends on its id only, so a drafter with a reduced vocabulary passes its
    ids and sees the very noise that the target sees.

    g = -log(E) with E = -log(1 - v) exponential. The winner of a Gumbel race has the smallest E / p, so it is small
    v that must be resolved finely: v is a multiple of 2**-33 and never 0, and log1p keeps it; near 1 it is capped at
    1 - 2**-24. Hence -2.82 < g < 22.88, always finite.
    """
    num_columns = vocab if isinstance(vocab, int) else vocab.shape[-1]
    hashed = _hash_vocabulary(vocab, keys.device) if isinstance(vocab, int) else hash_ids(vocab)
    hashed = hashed.expand(keys.shape[0], num_columns)
    noise = torch.empty(keys.shape[0], num_columns, dtype=torch.float32, device=keys.device)
    num_rows = keys.shape[0]
    # On the CPU some rows at a time, so that thirty passes run in cache; on a GPU all at once.
    step = max(1, _CHUNK_ELEMENTS // max(1, num_columns)) if keys.is_cpu else num_rows
    for start in range(0, num_rows, max(1, step)):
        chunk = slice(start, start + step)
        _fill_gumbel(noise[chunk], hashed[chunk], keys[chunk])
    return noise


def _fill_gumbel(out: Tensor, hashed: Tensor, keys: Tensor) -> None:
    x = hashed ^ keys[:, :1]
    scratch = torch.empty_like(x)
    _mix32(x, scratch, _ROUND_A)
    x.bitwise_xor_(keys[:, 1:])
    _mix32(x, scratch, _ROUND_B)
    # |x + 1/4| of a signed x runs over all 2**32 odd multiples of 1/4 (rounded to float32 when large).
    out.copy_(x).add_(0.25).abs_().mul_(-(2.0**-31)).clamp_(min=-(1.0 - 2.0**-24))
    out.log1p_().neg_().log_().neg_()
