"""Device functions of the persistent kernel: operands without shared memory, and a barrier over the whole grid.

**Operands.** A row-major matrix [rows, K] is loaded as five axes [rows / 8, KB, KS, 8, 32]: 16 bytes a lane, four lanes
side by side in a row, eight rows a warp, each of the KS warps another slice of K. In that order a lane holds what the
tensor core's m16n8k16 wants of it, but for the order of K inside 32 elements, which only has to be the same in both
operands. So reshaping and permuting to [KS, rows, KB * 32] moves no data (the compiler finds that the layouts agree),
and a batched `tl.dot` gives each warp its own part of the reduction. That takes KS = the number of warps; with another
number the result is the same, through shared memory. Neither weights nor activations have to be packed.

**Barrier.** One counter in memory, raised by each program on arrival (release) and polled until everyone has come
(acquire): the order that PTX's memory model (PTX ISA, "Memory consistency model", causality order) asks for, with the
program's own barrier before the arrival. Data written by others must then be read past the first-level cache (`.cg`).
"""

from __future__ import annotations

import triton
import triton.language as tl

ERROR_AT = 64
"""`sync` is int32 [96], one 128-byte line a purpose: arrivals at 0, departures at 32, the error flag at 64."""


ROWS_FIRST = tl.constexpr(tuple(map(int, triton.__version__.split(".")[:2])) < (3, 7))
"""Among axes equally far from contiguous, the compiler deals lanes and warps to the first one first (3.6) or to
the last one first (3.7). So the axes are [8, KS, KB, rows / 8, 32] or the other way round; texts show the latter."""


@triton.jit
def rows_of(first: tl.tensor, A: tl.constexpr) -> tl.tensor:
    """Row indices first … first + 8 A as [A, 1, 1, 8, 1]."""
    if ROWS_FIRST:
        return first + tl.arange(0, A)[None, None, None, :, None] * 8 + tl.arange(0, 8)[:, None, None, None, None]
    else:  # noqa: RET505  a constant: only one branch is compiled
        return first + tl.arange(0, A)[:, None, None, None, None] * 8 + tl.arange(0, 8)[None, None, None, :, None]


@triton.jit
def warps_of(KS: tl.constexpr) -> tl.tensor:
    """0 … KS as [1, 1, KS, 1, 1]."""
    if ROWS_FIRST:
        return tl.arange(0, KS)[None, :, None, None, None]
    else:  # noqa: RET505
        return tl.arange(0, KS)[None, None, :, None, None]


@triton.jit
def blocks_of(KB: tl.constexpr) -> tl.tensor:
    """0 … KB as [1, KB, 1, 1, 1]."""
    if ROWS_FIRST:
        return tl.arange(0, KB)[None, None, :, None, None]
    else:  # noqa: RET505
        return tl.arange(0, KB)[None, :, None, None, None]


@triton.jit
def load_operand(
    ptr: tl.tensor,
    offsets: tl.tensor,
    ok: tl.tensor,
    k0: tl.tensor,
    K: tl.constexpr,
    KB: tl.constexpr,
    KS: tl.constexpr,
    SPREAD: tl.constexpr,
    SHARED: tl.constexpr,
) -> tl.tensor:
    """Columns k0 … k0 + KB * KS * 32 (masked at K) of the rows that start at `offsets` [A, 1, 1 or KS, 8, 1].

    SPREAD: each warp has its own columns; else all KS have the same KB * 32. SHARED: this launch wrote it.
    """
    kb, ks = blocks_of(KB), warps_of(KS)
    e = tl.arange(0, 32)[None, None, None, None, :]
    k = (k0 + (kb * KS + ks) * 32 + e) if SPREAD else (k0 + kb * 32 + ks * 0 + e)
    mask = ok & (k < K)
    if SHARED:
        return tl.load(ptr + offsets + k, mask=mask, other=0.0, cache_modifier=".cg")
    return tl.load(ptr + offsets + k, mask=mask, other=0.0)


@triton.jit
def as_operand(block: tl.tensor, A: tl.constexpr, KB: tl.constexpr, KS: tl.constexpr) -> tl.tensor:
    """[A, KB, KS, 8, 32] -> [KS, 8 A, 32 KB], K reordered inside 32: lane, fragment, pair -> fragment, lane, pair."""
    if ROWS_FIRST:
        parts = tl.permute(tl.reshape(block, (8, KS, KB, A, 4, 4, 2)), (1, 3, 0, 2, 5, 4, 6))
    else:
        parts = tl.permute(tl.reshape(block, (A, KB, KS, 8, 4, 4, 2)), (2, 0, 3, 1, 5, 4, 6))
    return tl.reshape(parts, (KS, A * 8, KB * 32))


@triton.jit
def prefetch_rows(ptr: tl.tensor, offsets: tl.tensor, ok: tl.tensor, K: tl.constexpr, LINE: tl.constexpr) -> None:
    """Asks for the cache lines (LINE elements) of rows that start at `offsets` [N] to be brought to L2."""
    LINES: tl.constexpr = triton.next_power_of_2((K + LINE - 1) // LINE)
    k = tl.arange(0, LINES)[None, :] * LINE
    wanted = (ok[:, None] & (k < K)).to(tl.int32)
    tl.inline_asm_elementwise(
        "{ .reg .pred p; setp.ne.s32 p, $2, 0; @p prefetch.global.L2 [$1]; mov.u32 $0, 0; }",
        "=r,l,r",
        [ptr + offsets[:, None] + k, wanted],
        dtype=tl.int32,
        is_pure=False,
        pack=1,
    )


@triton.jit
def arrive(sync: tl.tensor) -> None:
    """Everything this program wrote so far is to be seen by those who wait for it."""
    tl.debug_barrier()
    tl.atomic_add(sync, 1, sem="release", scope="gpu")


@triton.jit
def _arrivals(sync: tl.tensor) -> tl.tensor:
    return tl.inline_asm_elementwise(
        "ld.acquire.gpu.global.u32 $0, [$1];", "=r,l", [sync], dtype=tl.int32, is_pure=False, pack=1
    )


@triton.jit
def wait(sync: tl.tensor, target: tl.tensor, patience: tl.tensor) -> tl.tensor:
    """Polls until `target` arrivals; returns what is left of `patience` (polls). Each warp polls for itself.

    Patience is one budget for the whole launch: if programs are missing, everyone runs on with wrong data and ends.
    """
    seen = _arrivals(sync)
    while (seen < target) & (patience > 0):
        patience -= 1
        seen = _arrivals(sync)
    return patience


@triton.jit
def leave(sync: tl.tensor, patience: tl.tensor, NUM_PROGRAMS: tl.constexpr, ERROR: tl.constexpr) -> None:
    """The last program to leave sets the counters back to 0 for the next launch; spent patience raises the flag."""
    tl.inline_asm_elementwise(  # by every warp: each has its own patience
        "{ .reg .pred p; setp.le.s32 p, $2, 0; @p st.global.u32 [$1], 1; mov.u32 $0, 0; }",
        "=r,l,r",
        [sync + ERROR, patience],
        dtype=tl.int32,
        is_pure=False,
        pack=1,
    )
    tl.debug_barrier()
    gone = tl.atomic_add(sync + 32, 1, sem="acq_rel", scope="gpu")
    if gone == NUM_PROGRAMS - 1:
        tl.atomic_xchg(sync + 32, 0)
        tl.atomic_xchg(sync, 0)
