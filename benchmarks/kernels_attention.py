"""Attention of decode and verify on one GPU: correct, how near to the bandwidth bound, whether the defaults are best.

    python benchmarks/kernels_attention.py [--quick] [--threads 12]

Decode and verify (W query tokens a row) at contexts of 256 to 32k, batch 1 to 64, for the heads of Llama-3.1-8B and
SmolLM2-135M: microseconds a launch inside a CUDA graph of many launches, each with blocks of its own, so that the
second-level cache holds what it would hold in a step: nothing. Share: least bytes / time / 3.02 TB/s. `default` is what
`decode_tile` and `plan_splits` choose, `best` the fastest of a few alternatives, `exact` deterministic mode. `planned`:
the default again, with splits planned for 131,072 tokens. Then a chain of 30 pairs as in a step: a stand-in for the qkv
projection, which lets attention start early, and attention; its time less that of the stand-ins alone.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import torch
import triton
import triton.language as tl
from torch import Tensor

from server.kernels.attention import Splits, Tile, Workspace, attention_reference, decode_attention, plan_splits
from server.kernels.attention_plan import bytes_moved, decode_tile
from server.kernels.paged import PagedRows
from server.kernels.runtime import num_sms

PEAK = 3.02e12
BLOCK = 16
ROTATED_BYTES = 256 << 20
MAX_LAUNCHES = 128
DEVICE = torch.device("cuda")
DTYPE = torch.bfloat16
PLANNED = 131072
CHAIN = 30


@dataclass(frozen=True)
class Heads:
    name: str
    heads: int
    kv_heads: int
    dim: int

    def pool(self, tokens: int) -> Tensor:
        return torch.empty(tokens, 2 * self.kv_heads, self.dim, dtype=DTYPE, device=DEVICE).uniform_(-1, 1)


SHAPES = (Heads("8b", 32, 8, 128), Heads("135m", 9, 3, 64))


@dataclass(frozen=True)
class Way:
    """One way to launch: a tile, how the context is split, and whether older tokens are read early."""

    tile: Tile
    splits: Splits
    settled: bool = True

    def __str__(self) -> str:
        t, s = self.tile, self.splits
        how = ("" if s.fused else " 2nd") + ("" if self.settled else " late")
        return f"{t.block_m}x{t.block_n} w{t.num_warps} s{t.num_stages} x{s.num_splits} min{s.min_tiles}{how}"


def default_way(shape: Heads, width: int, batch: int, context: int) -> Way:
    sms = num_sms(DEVICE)
    group, programs = shape.heads // shape.kv_heads, batch * shape.kv_heads
    tile = decode_tile(width, group, shape.dim, DTYPE, DTYPE, exact=False, programs=programs)
    return Way(tile, plan_splits(batch, width, shape.heads, shape.kv_heads, context, sms, block_n=tile.block_n))


def ways(shape: Heads, width: int, batch: int, context: int) -> Iterator[Way]:
    """The default, then one thing changed at a time."""
    first = default_way(shape, width, batch, context)
    tile, plan = first.tile, first.splits
    yield first
    yield replace(first, settled=False)
    other = Tile(tile.block_m, 64, 4, 4) if tile.block_n == 128 else Tile(tile.block_m, 32, 4, 4)
    times = tile.block_n // other.block_n
    yield Way(other, replace(plan, min_tiles=plan.min_tiles * times, whole_tiles=plan.whole_tiles * times))
    most = -(-context // tile.block_n)
    for number in {max(1, plan.num_splits // 2), min(most, plan.num_splits * 2, 64)} - {plan.num_splits}:
        yield replace(first, splits=Splits(number, None, number, 1))
    if plan.num_splits > 1:
        yield replace(first, splits=replace(plan, fused=not plan.fused))


def exact_way(shape: Heads, width: int, batch: int, context: int) -> Way:
    tile = decode_tile(width, shape.heads // shape.kv_heads, shape.dim, DTYPE, DTYPE, exact=True)
    return Way(tile, plan_splits(batch, width, shape.heads, shape.kv_heads, context, num_sms(DEVICE), True))


@dataclass
class Case:
    """`launches` sets of `batch` rows over one pool, every set with blocks of its own as far as the pool reaches."""

    shape: Heads
    width: int
    batch: int
    context: int
    pool: Tensor
    workspace: Workspace

    def __post_init__(self) -> None:
        self.bytes = bytes_moved(
            self.batch, self.width, self.shape.heads, self.shape.kv_heads, self.shape.dim, self.context, DTYPE
        )
        self.launches = max(4, min(MAX_LAUNCHES, ROTATED_BYTES // self.bytes))
        per_row = self.context // BLOCK
        number = self.launches * self.batch * per_row
        blocks = torch.randperm(len(self.pool) // BLOCK - 1, device=DEVICE) + 1
        self.tables = blocks.repeat(-(-number // len(blocks)))[:number].view(-1, per_row).int()
        self.q = torch.randn(
            self.batch * self.width, self.shape.heads + 2 * self.shape.kv_heads, self.shape.dim, device=DEVICE
        )
        self.q = self.q.to(DTYPE)[:, : self.shape.heads]
        self.starts = torch.full((self.batch,), self.context - self.width, device=DEVICE)
        self.slots = torch.arange(self.launches * self.batch, device=DEVICE).view(self.launches, self.batch)

    def launch(self, way: Way, number: int = 0, q: Tensor | None = None, out: Tensor | None = None) -> Tensor:
        """`q` and `out`: as part of a chain of overlapping kernels."""
        rows = PagedRows(self.slots[number], self.starts, self.tables, BLOCK, self.context, width=self.width)
        return decode_attention(
            self.q if q is None else q, self.pool, rows, scale=self.shape.dim**-0.5, splits=way.splits, tile=way.tile,
            workspace=self.workspace, settled=way.settled, pdl=q is not None, out=out,
        )  # fmt: skip

    def microseconds(self, way: Way) -> float:
        self.launch(way)
        return graph_microseconds(lambda i: self.launch(way, i), self.launches)


def graph_microseconds(launch: Callable[[int], object], launches: int, repeats: int = 3) -> float:
    """Time of one launch inside a graph of `launches`, the fastest of `repeats`."""
    graph = torch.cuda.CUDAGraph()
    torch.cuda.synchronize()
    with torch.cuda.graph(graph):
        for i in range(launches):
            launch(i)
    graph.replay()
    times = []
    for _ in range(repeats):
        begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        begin.record()
        graph.replay()
        end.record()
        end.synchronize()
        times.append(begin.elapsed_time(end) * 1e3 / launches)
    return float(min(times))


def compile_all(cases: list[Case], threads: int) -> None:
    """Every kernel once, several at a time: compiling lets go of the interpreter's lock."""
    jobs: dict[str, tuple[Case, Way]] = {}
    for case in cases:
        options = (*ways(case.shape, case.width, case.batch, case.context),)
        for way in (*options, exact_way(case.shape, case.width, case.batch, case.context)):
            split = "" if way.splits.num_splits == 1 else "split"
            key = f"{case.shape.name} {case.width} {way.tile} {split} {way.splits.fused} {way.splits.split_tokens}"
            key += f" {way.settled}"
            jobs.setdefault(key, (case, way))
    begin = time.perf_counter()
    with ThreadPoolExecutor(threads) as pool:
        list(pool.map(lambda job: job[0].launch(job[1]), jobs.values()))
    torch.cuda.synchronize()
    print(f"{len(jobs)} kernels in {time.perf_counter() - begin:.1f} s")


def check(case: Case) -> None:
    """Every way of a case against the reference."""
    rows = PagedRows(case.slots[0], case.starts, case.tables, BLOCK, case.context, width=case.width)
    expected = attention_reference(case.q, case.pool, rows, scale=case.shape.dim**-0.5).float()
    for way in (*ways(case.shape, case.width, case.batch, case.context),
                exact_way(case.shape, case.width, case.batch, case.context)):  # fmt: skip
        found = case.launch(way).float()
        error = float((found - expected).norm() / expected.norm())
        if not error < 1e-2:
            print(f"WRONG {case.shape.name} W={case.width} {way}: relative error {error:.2e}")
    if int(case.workspace.counters.abs().sum()):
        print("WRONG: counters were not reset")


def sweep(case: Case) -> None:
    timed = {way: case.microseconds(way) for way in ways(case.shape, case.width, case.batch, case.context)}
    default, best = next(iter(timed)), min(timed, key=lambda w: timed[w])
    exact = case.microseconds(exact_way(case.shape, case.width, case.batch, case.context))
    planned = case.microseconds(default_way(case.shape, case.width, case.batch, PLANNED))

    def share(us: float) -> str:
        return f"{us:8.2f} {100 * case.bytes / us / 1e-6 / PEAK:3.0f}%"

    print(
        f"{case.shape.name:4} W{case.width} {case.context:5} x{case.batch:<2} default {share(timed[default])}"
        f" [{default}]  best {share(timed[best])} [{best}]  exact {share(exact)}  planned {planned:8.2f}",
        flush=True,
    )


@triton.jit  # type: ignore[untyped-decorator]
def producer_kernel(
    x: tl.tensor, weights: tl.tensor, q: tl.tensor, BLOCK: tl.constexpr, LOADS: tl.constexpr, OUT: tl.constexpr
) -> None:
    """A projection's behaviour: its share of the weights at once, then what the kernel before left, then a few q."""
    tl.extra.cuda.gdc_launch_dependents()
    total = tl.zeros([BLOCK], tl.float32)
    for i in tl.static_range(LOADS):
        at = (tl.program_id(0) * LOADS + i) * BLOCK + tl.arange(0, BLOCK)
        total += tl.load(weights + at).to(tl.float32)
    tl.extra.cuda.gdc_wait()
    n = tl.program_id(0) * OUT + tl.arange(0, OUT)
    y = tl.load(x + n).to(tl.float32) + tl.sum(total, 0) * 1e-6
    tl.store(q + n, y.to(q.dtype.element_ty))


def chain(shape: Heads, batch: int, context: int, pool: Tensor, workspace: Workspace) -> None:
    """Attention's time in a step: what 30 of them add to 30 projections."""
    case = Case(shape, 1, batch, context, pool, workspace)
    hidden = shape.heads * shape.dim
    block, loads, share = (1024, 15, 16) if hidden < 1024 else (2048, 48, 16)
    programs = hidden // share
    weights = torch.randn(programs * block * loads, device=DEVICE).to(DTYPE)
    q = torch.randn(batch, shape.heads, shape.dim, device=DEVICE).to(DTYPE)
    out = torch.zeros(batch, hidden, device=DEVICE, dtype=DTYPE)

    def produce() -> None:
        producer_kernel[(programs,)](out, weights, q, block, loads, share, num_warps=8, launch_pdl=True)

    def pair(way: Way, number: int) -> None:
        produce()
        case.launch(way, number % case.launches, q, out)

    produce()
    alone = graph_microseconds(lambda _: produce(), CHAIN, 10)
    first = default_way(shape, 1, batch, context)
    line = []
    for name, way in (("default", first), ("late", replace(first, settled=False))):
        for planned in (context, PLANNED):
            used = replace(way, splits=default_way(shape, 1, batch, planned).splits)
            pair(used, 0)
            whole = graph_microseconds(partial(pair, used), CHAIN, 10)
            line.append(f"{name} planned {planned} {whole - alone:6.2f}")
    print(f"chain {shape.name:4} {context} x{batch}  {'  '.join(line)}  (stand-in {alone:.2f})", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="contexts 1k and 32k, W 1 only")
    parser.add_argument("--threads", type=int, default=12, help="kernels compiled at a time")
    given = parser.parse_args()
    begin = time.perf_counter()
    contexts, widths = ((1024, 32768), (1,)) if given.quick else ((256, 1024, 8192, 32768), (1, 5))
    for shape in SHAPES:
        pool = shape.pool(64 * 32768 + BLOCK)
        workspace = Workspace.allocate(DEVICE, 1 << 20, shape.dim, 1 << 14)
        small = [Case(shape, width, 2, 1024, pool, workspace) for width in widths]
        every = [(width, context, batch) for width in widths for context in contexts for batch in (1, 8, 64)]
        compile_all([*small, *(Case(shape, w, 1, 256, pool, workspace) for w in widths)], given.threads)
        for case in small:
            check(case)
        for width, context, batch in every:
            sweep(Case(shape, width, batch, context, pool, workspace))
        for batch in (1, 8):
            chain(shape, batch, 256, pool, workspace)
        del pool
        print(f"{shape.name}: {time.perf_counter() - begin:.1f} s so far", flush=True)


if __name__ == "__main__":
    main()
