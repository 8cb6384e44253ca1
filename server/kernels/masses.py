"""Integer probability masses and the search for a threshold on them, the arithmetic of `server.sampling.filters`.

A token's mass is an integer in units of 2**-40 of the most probable one, so sums do not depend on the order of
addition. It is kept in two int32 halves of 20 bits: 64-bit conversions are slow on a GPU.
"""

from __future__ import annotations

import triton
import triton.language as tl

from server.kernels.noise import exp

MASS, COUNT = tl.constexpr(0), tl.constexpr(1)
"""What a search adds up."""


@triton.jit
def mass_halves(x, peak):  # type: ignore[no-untyped-def]
    """exp(x - peak) * 2**40, truncated: its upper part and its lower 20 bits, int32. Exact: a power of two scales."""
    scaled = exp(x - peak) * 1048576.0
    upper = scaled.to(tl.int32)
    lower = ((scaled - upper.to(tl.float32)) * 1048576.0).to(tl.int32)
    return upper, lower


@triton.jit
def joined(upper, lower):  # type: ignore[no-untyped-def]
    """The masses that two halves stand for, int64."""
    return (upper.to(tl.int64) << 20) + lower.to(tl.int64)


@triton.jit
def load_scaled(logits, columns, V, temperature):  # type: ignore[no-untyped-def]
    """Logits over the temperature; -inf outside the vocabulary and for anything that is not finite."""
    x = tl.load(logits + columns, mask=columns < V, other=-float("inf")).to(tl.float32)
    x = tl.div_rn(x, temperature)
    return tl.where(tl.abs(x) < float("inf"), x, -float("inf"))


@triton.jit
def pivot(low, high, share):  # type: ignore[no-untyped-def]
    """A value in (low, high], `share` of the way up if rounding permits."""
    middle = low + (high - low) * share
    return tl.where((middle > low) & (middle <= high), middle, high)


@triton.jit
def sum_above(logits, V, temperature, peak, least, at, WHAT: tl.constexpr, BLOCK: tl.constexpr):  # type: ignore[no-untyped-def]
    """Over the logits of at least `least`: what those >= `at` sum to (int64), the least of them, the largest below."""
    lanes = tl.arange(0, BLOCK)
    upper = tl.zeros((BLOCK,), tl.int32)
    lower = tl.zeros((BLOCK,), tl.int32)
    above = tl.full((BLOCK,), float("inf"), tl.float32)
    below = tl.full((BLOCK,), -float("inf"), tl.float32)
    for start in range(0, V, BLOCK):
        x = load_scaled(logits, start + lanes, V, temperature)
        within = (x >= at) & (x >= least) & (x > -float("inf"))
        above = tl.minimum(above, tl.where(within, x, float("inf")))
        below = tl.maximum(below, tl.where((x >= least) & (x < at), x, -float("inf")))
        if WHAT == COUNT:
            lower += within.to(tl.int32)
        else:
            more_upper, more_lower = mass_halves(x, peak)
            upper += tl.where(within, more_upper, 0)
            lower += tl.where(within, more_lower, 0)
    return tl.sum(joined(upper, lower), 0), tl.min(above, 0), tl.max(below, 0)


@triton.jit
def search_all(logits, V, temperature, peak, least, wanted, WHAT: tl.constexpr, BLOCK: tl.constexpr):  # type: ignore[no-untyped-def]
    """The largest logit such that those at or above it (none below `least`) sum to `wanted` (float64); -inf if none.

    Reads the vocabulary once a step. Steps end on logits that exist, so their number is bounded; alternately they aim
    where a straight line reaches the sum and half way.
    """
    total, low, _ = sum_above(logits, V, temperature, peak, least, least, WHAT, BLOCK)
    high = tl.where(total > 0, peak, -float("inf"))
    low = tl.where(total.to(tl.float64) >= wanted, low, -float("inf"))
    at_low = total.to(tl.float64)
    at_high = at_low * 0.0
    halve = 0
    while (low > -float("inf")) & (low < high):
        share = tl.where(halve != 0, 0.5, ((at_low - wanted) / (at_low - at_high)).to(tl.float32))
        middle = pivot(low, high, share)
        got, above, below = sum_above(logits, V, temperature, peak, least, middle, WHAT, BLOCK)
        reached = got.to(tl.float64) >= wanted
        low = tl.where(reached, above, low)
        at_low = tl.where(reached, got.to(tl.float64), at_low)
        high = tl.where(reached, high, below)
        at_high = tl.where(reached, at_high, got.to(tl.float64))
        halve = 1 - halve
    return low


@triton.jit
def search_block(x, upper, lower, wanted, beyond):  # type: ignore[no-untyped-def]
    """`search_all` over a block `x` that is at hand, -inf where there is nothing, with the masses' halves beside it.

    `beyond` (int64) is the sum of logits that are not in the block: all of them larger than any that is. Together they
    must sum to `wanted` at least.
    """
    high = tl.max(x)
    low = tl.min(tl.where(x > -float("inf"), x, float("inf")))
    while low < high:
        middle = pivot(low, high, 0.5)
        within = x >= middle
        got = beyond + tl.sum(tl.where(within, joined(upper, lower), 0))
        above = tl.min(tl.where(within, x, float("inf")))
        below = tl.max(tl.where(within, -float("inf"), x))
        reached = got.to(tl.float64) >= wanted
        low = tl.where(reached, above, low)
        high = tl.where(reached, high, below)
    return low
