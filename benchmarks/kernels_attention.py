"""Attention kernels on one GPU: correct, how near to the bandwidth bound, and which knobs are best.

    python benchmarks/kernels_attention.py [--quick] [--threads 12] [--no-prefill]

Decode and verify (W query tokens a row) at contexts of 256 to 32k, batch 1 to 64, for the heads of Llama-3.1-8B and
SmolLM2-135M: microseconds a launch inside a CUDA graph of many launches, each with blocks of its own, so that the
second-level cache holds what it would hold in a step: nothing. Share: least bytes / time / 3.02 TB/s. `default` is what
`decode_tile` and `plan_splits` choose, `best` the fastest of the sweep, `exact` deterministic mode. Then prefill of
16 x 2048 tokens: TFLOP/s of causal attention (half the square) for the paged kernel and for `fresh_attention`.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import torch
from torch import Tensor

from server.kernels.attention import Splits, Tile, Workspace, attention_reference, decode_attention, plan_splits
from server.kernels.attention_plan import bytes_moved, decode_tile
from server.kernels.attention_prefill import fresh_attention, prefill_attention, prefill_tile
from server.kernels.paged import PagedRows
from server.kernels.runtime import num_sms

PEAK = 3.02e12
BLOCK = 16
ROTATED_BYTES = 256 << 20
MAX_LAUNCHES = 256
DEVICE = torch.device("cuda")
DTYPE = torch.bfloat16


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
    """One way to launch: a tile and how the context is split."""

    tile: Tile
    splits: Splits

    def __str__(self) -> str:
        t, s = self.tile, self.splits
        how = "" if s.fused else " 2nd"
        return f"{t.block_m}x{t.block_n} w{t.num_warps} s{t.num_stages} x{s.num_splits} min{s.min_tiles}{how}"


def tiles(shape: Heads, width: int) -> list[Tile]:
    """The default first."""
    first = decode_tile(width, shape.heads // shape.kv_heads, shape.dim, DTYPE, DTYPE, exact=False)
    knobs = [(64, 4, 3), (64, 4, 4), (32, 4, 4), (128, 8, 3)]
    return [first, *(t for t in (Tile(first.block_m, *k) for k in knobs) if t != first)]


def ways(shape: Heads, width: int, batch: int, context: int) -> Iterator[Way]:
    """The default, other tiles with its splits, then other splits with its tile."""
    options = tiles(shape, width)
    plan = plan_splits(batch, width, shape.heads, shape.kv_heads, context, num_sms(DEVICE))
    for tile in options:
        yield Way(tile, plan)
    most = -(-context // 64)
    for factor in (0.5, 2):
        number = int(plan.num_splits * factor)
        if 1 <= number <= most and number != plan.num_splits:
            yield Way(options[0], replace(plan, num_splits=number, partials=number, min_tiles=1))
    if plan.num_splits > 1:
        yield Way(options[0], replace(plan, fused=False))
        yield Way(options[0], Splits(1))
    for fewest in (1, 4):
        if plan.num_splits > 1 and most > fewest:
            number = min(most, 2 * num_sms(DEVICE) // max(1, batch * shape.kv_heads))
            if number > 1:
                yield Way(options[0], Splits(number, None, number, fewest))


def exact_way(shape: Heads, width: int, batch: int, context: int) -> Way:
    plan = plan_splits(batch, width, shape.heads, shape.kv_heads, context, num_sms(DEVICE), deterministic=True)
    return Way(decode_tile(width, shape.heads // shape.kv_heads, shape.dim, DTYPE, DTYPE, exact=True), plan)


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

    def launch(self, way: Way, number: int = 0) -> Tensor:
        rows = PagedRows(self.slots[number], self.starts, self.tables, BLOCK, self.context, width=self.width)
        return decode_attention(
            self.q, self.pool, rows, scale=self.shape.dim**-0.5, splits=way.splits, tile=way.tile,
            workspace=self.workspace,
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


def microseconds(call: Callable[[], object], repeats: int = 5) -> float:
    """The fastest of `repeats`, without a graph: for calls that are long beside a launch."""
    times = []
    for _ in range(repeats):
        begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        begin.record()
        call()
        end.record()
        end.synchronize()
        times.append(begin.elapsed_time(end) * 1e3)
    return float(min(times))


def compile_all(cases: list[Case], threads: int) -> None:
    """Every kernel once, several at a time: compiling lets go of the interpreter's lock."""
    jobs: dict[str, tuple[Case, Way]] = {}
    for case in cases:
        options = (*ways(case.shape, case.width, case.batch, case.context),)
        for way in (*options, exact_way(case.shape, case.width, case.batch, case.context)):
            split = "" if way.splits.num_splits == 1 else "split"
            key = f"{case.shape.name} {case.width} {way.tile} {split} {way.splits.fused} {way.splits.split_tokens}"
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

    def share(us: float) -> str:
        return f"{us:8.2f} {100 * case.bytes / us / 1e-6 / PEAK:3.0f}%"

    print(
        f"{case.shape.name:4} W{case.width} {case.context:5} x{case.batch:<2} default {share(timed[default])}"
        f" [{default}]  best {share(timed[best])} [{best}]  exact {share(exact)}",
        flush=True,
    )


def prompt_rows(batch: int, length: int) -> PagedRows:
    tables = (torch.randperm(batch * length // BLOCK, device=DEVICE) + 1).int().view(batch, -1)
    offsets = torch.arange(batch + 1, device=DEVICE).int() * length
    starts = torch.zeros(batch, dtype=torch.int64, device=DEVICE)
    slots = torch.arange(batch, device=DEVICE)
    return PagedRows(slots, starts, tables, BLOCK, length, offsets=offsets, max_width=length, fresh=True)


def prefill(shape: Heads, pool: Tensor, batch: int = 16, length: int = 2048) -> None:
    """TFLOP/s, 4 D flops a visible pair of tokens and head; and that all ways agree."""
    rows = prompt_rows(batch, length)
    kv = torch.randn(batch * length, shape.heads + 2 * shape.kv_heads, shape.dim, device=DEVICE, dtype=DTYPE)
    q, k, v = kv.split((shape.heads, shape.kv_heads, shape.kv_heads), dim=1)
    at = torch.arange(length, device=DEVICE)
    places = rows.block_tables.long()[:, at // BLOCK] * BLOCK + at % BLOCK
    pool[places.flatten()] = kv[:, shape.heads :]
    flops = 4 * shape.dim * shape.heads * batch * length * (length + 1) / 2
    scale = shape.dim**-0.5

    def paged(tile: Tile | None = None, deterministic: bool = False) -> Tensor:
        return prefill_attention(q, pool, rows, scale=scale, tile=tile, deterministic=deterministic)

    first = prefill_tile(shape.dim, DTYPE)
    knobs = [(128, 64, 8, 2), (128, 64, 8, 4), (128, 128, 8, 2), (64, 64, 4, 3), (64, 64, 4, 2), (64, 128, 4, 2)]
    options = [first, *(t for t in (Tile(*k) for k in knobs) if t != first)]
    named: dict[str, Callable[[], Tensor]] = {str(t): partial(paged, t) for t in options}
    named["deterministic"] = lambda: paged(deterministic=True)
    named["fresh_attention"] = lambda: fresh_attention(q, k, v, rows, scale=scale)

    def compiled(tile: Tile) -> None:
        with suppress(Exception):  # reported when its turn comes
            paged(tile)

    with ThreadPoolExecutor(8) as compiling:
        list(compiling.map(compiled, options))
    expected = None
    for name, call in named.items():
        try:
            found = call().float()
            us = microseconds(call)
        except Exception as refused:  # noqa: BLE001  one refused configuration must not end the run
            print(f"prefill {shape.name} {name}: {type(refused).__name__}: {str(refused)[:200]}")
            continue
        expected = found if expected is None else expected
        error = float((found - expected).norm() / expected.norm())
        print(f"prefill {shape.name} {us:9.1f} us {flops / us / 1e6:6.1f} TFLOP/s  {name}  (differs {error:.1e})")


def bits(shape: Heads, pool: Tensor) -> None:
    """Deterministic mode: a prompt's last tokens, decoded and verified, have the prompt's bits."""
    rows = prompt_rows(2, 2048)
    q = torch.randn(4096, shape.heads, shape.dim, device=DEVICE, dtype=DTYPE)
    how = {"scale": shape.dim**-0.5}
    whole = prefill_attention(q, pool, rows, deterministic=True, **how)
    workspace = Workspace.allocate(DEVICE, 1 << 14, shape.dim, 4096)
    for width in (1, 3, 5, 16):
        for last in (600, 1537, 2048):
            few = replace(rows, starts=rows.starts + last - width, offsets=None, fresh=False, width=width)
            index = (torch.arange(2)[:, None] * 2048 + torch.arange(last - width, last)).flatten().to(DEVICE)
            splits = plan_splits(2, width, shape.heads, shape.kv_heads, last, num_sms(DEVICE), deterministic=True)
            found = decode_attention(q[index], pool, few, splits=splits, workspace=workspace, **how)
            if not torch.equal(found, whole[index]):
                print(f"BITS DIFFER {shape.name} W={width} context {last}: {int((found != whole[index]).sum())} values")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="contexts 1k and 32k, W 1 only")
    parser.add_argument("--threads", type=int, default=12, help="kernels compiled at a time")
    parser.add_argument("--no-prefill", action="store_true")
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
        bits(shape, pool)
        if not given.no_prefill:
            prefill(shape, pool)
        del pool
        print(f"{shape.name}: {time.perf_counter() - begin:.1f} s so far", flush=True)


if __name__ == "__main__":
    main()
