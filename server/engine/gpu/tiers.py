"""Batch tiers: the numbers of rows that CUDA graphs are captured for. A step is padded to the next one. And token
tiers, which are the same for prompt chunks."""

from __future__ import annotations

from bisect import bisect_left

_EXACT = (1, 2, 4, 8, 16, 24, 32, 48, 64)
_STEP = 32
_TOKENS = (16, 32, 64, 128, 192, 256, 384, 512, 768, 1024, 1536, 2048, 3072, 4096)
_TOKEN_STEP = 16


def batch_tiers(max_num_seqs: int) -> tuple[int, ...]:
    """Ascending tiers up to `max_num_seqs`, which is one itself. Rows, not tokens: a tier has a graph for every k."""
    wide = range(_EXACT[-1] + _STEP, max_num_seqs + 1, _STEP)
    return tuple(sorted({n for n in (*_EXACT, *wide) if n < max_num_seqs} | {max_num_seqs}))


def tier_of(tiers: tuple[int, ...], num_rows: int) -> int:
    """The smallest tier that holds `num_rows` rows. Raises ValueError if none does."""
    at = bisect_left(tiers, num_rows)
    if at == len(tiers):
        raise ValueError(f"num_rows: {num_rows} is not valid; use at most {tiers[-1]}")
    return tiers[at]


def token_tiers(max_tokens: int) -> tuple[int, ...]:
    """Ascending tiers up to `max_tokens`, rounded up to a multiple of 16, but none above 4096: nearly the whole of a
    device is busy then for longer than a host launches. No more than half of a step is padding, but in the first tier.
    """
    largest = min(-(-max_tokens // _TOKEN_STEP) * _TOKEN_STEP, _TOKENS[-1])
    return tuple(sorted({n for n in _TOKENS if n < largest} | {largest})) if largest else ()
