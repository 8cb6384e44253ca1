"""Tiles of 4-bit products on one GPU, many more than the engine chooses from: which belong on its list.

    python benchmarks/kernels_int4_tiles.py [--model 8b] [--tokens 1,16,64] [--budget 150]

Prints the ten fastest of each shape: microseconds a launch, over copies of the weights that the L2 cache does not hold.
A tile whose result is wrong is named and left out.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from itertools import product
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import torch

from benchmarks.kernels_8bit import Case, try_launch
from benchmarks.kernels_8bit_chain import DEVICE, PEAK, shapes_of
from benchmarks.kernels_chain import graph_us
from server.kernels.eightbit_tiles import EightTile
from server.kernels.skinny_tiles import Kind

FEW = [(32, 2), (64, 2), (64, 4), (128, 4), (128, 8)]
"""Rows of W and warps."""
MANY = [(64, 4), (128, 8), (128, 4), (64, 2), (256, 8)]


def tiles(case: Case) -> Iterator[EightTile]:
    """What is tried for a shape and a number of tokens."""
    kind, few = case.shape.kind, case.num_tokens <= 16
    split = ((4, 7) if case.shape.k >= 8192 else (2, 4)) if kind is Kind.RESIDUAL else (1,)
    stages, ahead = ((2, 3, 4), (2048, 8192)) if few else ((2, 3), (2048,))
    for parts, (rows, warps), depth, prefetch in product(split, FEW if few else MANY, stages, ahead):
        block = rows // 2 if kind is Kind.GATE_UP else rows
        yield EightTile(
            block, 512, parts=parts, swap=True, num_warps=warps, num_stages=depth, prefetch=prefetch
        )  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="8b")
    parser.add_argument("--tokens", default="1,16,64")
    parser.add_argument("--budget", type=float, default=150.0, help="seconds")
    options = parser.parse_args()
    torch.manual_seed(0)
    buffer = torch.empty(1540 << 20, dtype=torch.uint8, device=DEVICE)
    for part in buffer.split(64 << 20):
        part.copy_(torch.randn(len(part), device=DEVICE).to(torch.float8_e4m3fn).view(torch.uint8))
    tokens = [int(m) for m in options.tokens.split(",")]
    cases = [Case(s, "int4", m, buffer) for s in shapes_of(options.model)[:4] for m in tokens]
    end = time.monotonic() + options.budget
    for case in cases:
        found = list(tiles(case))
        with ThreadPoolExecutor(16) as pool:
            failures = list(pool.map(try_launch, ((case, tile) for tile in found)))
        expected, times = case.expected(), list[tuple[float, str]]()
        for tile, failure in zip(found, failures, strict=True):
            if failure or time.monotonic() > end:
                continue
            if case.error(tile, expected) > 1e-2:
                print("WRONG", case.name, tile.name)
                continue
            times.append((statistics.median(graph_us(partial(case.run, tile), len(case.weights), 1)), tile.name))
        refused = sum(bool(failure) for failure in failures)
        print(f"{case.name}: bandwidth {case.bytes / PEAK * 1e6:.1f} us; {refused} of {len(found)} do not run")
        for took, name in sorted(times)[:10]:
            print(f"  {took:7.2f} {name}")
        print(flush=True)


if __name__ == "__main__":
    main()
