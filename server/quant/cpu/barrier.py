"""Where threads of one step wait for each other, without Python.

Sense-reversing counter (Mellor-Crummey and Scott 1991, section 3.1): the last to arrive starts the next generation.
Waiting spins for some microseconds and then yields, as a busy machine may have stopped the thread that is waited for.
"""

from __future__ import annotations

from llvmlite import ir
from numba.core import types

from server.quant.cpu.vectors import I32, I64, Emitter, addresses, jit, kernel

BARRIER_BYTES = 128
"""Arrivals, and a cache line further the generation; int64, zero at first."""


@kernel(addresses(2), types.int64)
def atomic_add(e: Emitter, address: ir.Value, value: ir.Value) -> ir.Value:
    """Adds to an int64 and returns what was there."""
    return e.b.atomic_rmw("add", e.pointer(address, 0, I64), value, "seq_cst")


@kernel(addresses(1), types.int64)
def atomic_load(e: Emitter, address: ir.Value) -> ir.Value:
    """Reads an int64."""
    return e.b.load_atomic(e.pointer(address, 0, I64), "acquire", 8)


@kernel(addresses(2))
def atomic_store(e: Emitter, address: ir.Value, value: ir.Value) -> None:
    """Writes an int64."""
    e.b.store_atomic(value, e.pointer(address, 0, I64), "release", 8)


@kernel(())
def pause(e: Emitter) -> None:
    """Tells the processor that this thread spins."""
    e.call("llvm.x86.sse2.pause", ir.VoidType())


@kernel(())
def yield_thread(e: Emitter) -> None:
    """Lets another thread have the core."""
    e.call("sched_yield", I32)


@jit
def wait(barrier, threads):
    """Returns once all `threads` are here."""
    if threads == 1:
        return
    generation = atomic_load(barrier + 64)
    if atomic_add(barrier, 1) == threads - 1:
        atomic_store(barrier, 0)
        atomic_store(barrier + 64, generation + 1)
        return
    spins = 0
    while atomic_load(barrier + 64) == generation:
        spins += 1
        if spins < 1000:
            pause()
        else:
            yield_thread()
