"""Low-precision kernels on one GPU: right, how near to the memory's speed, and what the layers of a model take.

    python benchmarks/kernels_8bit.py [--models 8b] [--kinds fp8,int8] [--tokens 1,8,64] [--large 512,4096]

First every candidate tile is compiled and checked against its dequantised weight, and quantised activations against
`formats.quantize_activations`, bit for bit. Then, each in one CUDA graph over copies of the weights (more than 400 MB,
so that the L2 cache holds what it holds in a step: nothing): microseconds a launch and the share of the stored bytes at
3.02 TB/s, beside torch's own product; the quantising kernels; products of many tokens beside bfloat16; and all layers
with their head in one graph, attention left out, with the fastest tile of each. The file names the best tiles.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import torch
from torch import Tensor

from benchmarks.common import Row, write_result
from benchmarks.kernels_8bit_chain import (
    DEVICE,
    DTYPE,
    KINDS,
    PDL,
    PEAK,
    Shape,
    chain,
    measure_large,
    measure_quantising,
    plain,
    row,
    shapes_of,
    weights_of,
)
from benchmarks.kernels_chain import graph_us
from server.kernels.eightbit_linear import gate_up8, gate_up8_reference, linear8, linear8_parts, linear8_reference
from server.kernels.eightbit_qkv import qkv_rope8
from server.kernels.eightbit_tiles import EightTile, Weight, candidates
from server.kernels.quantize import Sums, quantize, total_reference
from server.kernels.skinny_tiles import Kind, block_m
from server.quant.formats import quantize_activations


class Case:
    """A shape, a format and a number of tokens."""

    def __init__(self, shape: Shape, kind: str, num_tokens: int, buffer: Tensor) -> None:
        self.shape, self.kind, self.num_tokens = shape, kind, num_tokens
        self.weights = weights_of(shape, kind, buffer)
        device = buffer.device
        self.x = quantize(torch.randn(num_tokens, shape.k, device=device).to(DTYPE), KINDS[kind])
        h = shape.heads
        self.pool = torch.zeros(num_tokens, 2 * h.num_kv_heads, h.head_dim, dtype=DTYPE, device=device)
        self.places = torch.arange(num_tokens, device=device)
        self.rotations = torch.zeros(128, h.head_dim // 2, 2, device=device)
        self.rotations[..., 0] = 1
        self.failed: set[EightTile] = set()

    @property
    def name(self) -> str:
        return f"{self.shape.model}/{self.kind}/{self.shape.name}/m{self.num_tokens}"

    @property
    def bytes(self) -> int:
        weight = self.weights[0]
        return weight.values.nbytes + weight.scales.nbytes

    def tiles(self) -> list[EightTile]:
        shape = self.shape
        size, weight = self.x.values.element_size(), self.weights[0]
        found = candidates(shape.kind, self.num_tokens, shape.n, shape.k, size, weight.group, weight.per)
        return [tile for tile in found if tile not in self.failed]

    def launch(self, weight: Weight, tile: EightTile) -> Tensor | Sums:
        kind, x = self.shape.kind, self.x
        if kind is Kind.QKV:
            return qkv_rope8(
                x, weight, None, self.pool, self.places, self.places, self.rotations, self.shape.heads, DTYPE,
                tile=tile, pdl=PDL, settled=True,
            )  # fmt: skip
        if kind is Kind.RESIDUAL:
            return linear8_parts(x, weight, tile=tile, pdl=PDL)
        if kind is Kind.GATE_UP:
            return gate_up8(x, weight, DTYPE, tile=tile, pdl=PDL)
        return linear8(x, weight, DTYPE, tile=tile, pdl=PDL)

    def run(self, tile: EightTile) -> None:
        for weight in self.weights:
            self.launch(weight, tile)

    def expected(self) -> Tensor:
        wide = plain(self.weights[0], self.x.values.dtype)
        run = gate_up8_reference if self.shape.kind is Kind.GATE_UP else linear8_reference
        return run(self.x, wide)

    def error(self, tile: EightTile, expected: Tensor) -> float:
        """Relative, of whatever the kernel writes; positions turn nothing here."""
        self.pool.fill_(float("nan"))
        found = self.launch(self.weights[0], tile)
        if isinstance(found, Sums):
            found = total_reference(found)
        elif self.shape.kind is Kind.QKV:
            found = torch.cat([found, self.pool.flatten(1)], dim=1)
        return float((found.float() - expected).norm() / expected.norm())

    def torch_ways(self) -> dict[str, Callable[[Weight], object]]:
        """Products of torch alone, without what the kernels fuse."""
        x, m = self.x, self.num_tokens
        if self.kind == "fp8":
            one = torch.ones((), device=x.values.device)
            rows = x.scales[:, None] if x.scales is not None else one
            return {
                "scaled_mm": lambda w: torch._scaled_mm(
                    x.values, w.values.t(), one, one, out_dtype=DTYPE, use_fast_accum=True
                ),
                "scaled_mm-rows": lambda w: torch._scaled_mm(
                    x.values, w.values.t(), rows, w.scales[None], out_dtype=DTYPE, use_fast_accum=True
                ),
            }
        if self.kind == "int8" and m > 16:
            return {"int_mm": lambda w: torch._int_mm(x.values, w.values.t())}
        return {}


def try_launch(work: tuple[Case, EightTile]) -> str:
    case, tile = work
    try:
        case.launch(case.weights[0], tile)
        torch.cuda.synchronize()
    except Exception as error:  # noqa: BLE001  # a candidate that does not run is a result
        return f"{type(error).__name__}: {str(error)[:200]}"
    return ""


def compile_and_check(cases: list[Case]) -> list[str]:
    """Compiles every candidate, many at a time, and checks it; what is wrong."""
    seen: dict[tuple[str, int, str], tuple[Case, EightTile]] = {}
    for case in cases:
        for tile in case.tiles():
            key = (f"{case.shape.model}{case.shape.name}{case.kind}", block_m(case.num_tokens), tile.name)
            seen.setdefault(key, (case, tile))
    wrong: list[str] = []
    with ThreadPoolExecutor(16) as pool:
        for (case, tile), failure in zip(seen.values(), pool.map(try_launch, seen.values()), strict=True):
            if failure:
                wrong.append(f"{case.name} {tile.name}: {failure}")
                for other in cases:
                    if (other.shape, other.kind) == (case.shape, case.kind):
                        other.failed.add(tile)
    for case in cases:
        expected = case.expected()
        for tile in case.tiles():
            error = case.error(tile, expected)
            if not error < 1e-2:
                wrong.append(f"{case.name} {tile.name}: relative error {error:.2e}")
    return wrong


def check_quantised() -> list[str]:
    """Rows whose bits are not the reference's, which is computed on the CPU: there division is division."""
    wrong = []
    for precision in ("fp8", "int8"):
        for width in (576, 4096, 14336):
            x = (torch.randn(33, width, device=DEVICE) * torch.rand(33, 1, device=DEVICE).exp()).to(DTYPE)
            q, scales = quantize_activations(x.cpu(), precision)
            found = quantize(x, precision)
            assert found.scales is not None
            unlike = int((found.values.cpu().float() != q.float()).sum())
            if unlike or not torch.equal(found.scales.cpu(), scales.flatten()):
                wrong.append(f"quantize {precision} {width}: {unlike} unlike numbers")
    return wrong


def _over(weights: list[Weight], product: Callable[[Weight], object]) -> None:
    for weight in weights:
        product(weight)


def measure(case: Case, best: dict[str, EightTile]) -> list[Row]:
    """Prints a line and gives the rows of a case; notes its fastest tile."""
    launches, least = len(case.weights), case.bytes / PEAK * 1e6
    times = {t: graph_us(partial(case.run, t), launches, 3) for t in case.tiles()}
    if not times:
        return []
    first = min(times, key=lambda t: statistics.median(times[t]))
    best[case.name] = first
    found = statistics.median(times[first])
    rows = [row(f"low_us/{case.name}/ours", times[first], first.name)]
    told = []
    for name, product in case.torch_ways().items():
        try:
            product(case.weights[0])
            took = graph_us(partial(_over, case.weights, product), launches, 3)
        except RuntimeError as error:
            told.append(f"{name} refused: {str(error)[:60]}")
            continue
        told.append(f"{name} {statistics.median(took):.1f}")
        rows.append(row(f"low_us/{case.name}/{name}", took))
    others = "  ".join(f"[{t.name.replace(' prefetch2048', '')}] {statistics.median(v):.1f}" for t, v in times.items())
    print(f"{case.name:26} {found:7.2f} us {least / found:5.0%}  {'  '.join(told)} | {others}", flush=True)
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", default="8b")
    parser.add_argument("--kinds", default="fp8,int8", help=", ".join(KINDS))
    parser.add_argument("--tokens", default="1,8,64")
    parser.add_argument("--large", default="512,4096")
    parser.add_argument("--chain", default="1,8,64")
    parser.add_argument("--name", default="kernels_8bit", help="of the result")
    args = parser.parse_args()
    tokens, large, steps = ([int(m) for m in text.split(",") if m] for text in (args.tokens, args.large, args.chain))
    models, kinds = args.models.split(","), args.kinds.split(",")
    begun = time.perf_counter()
    torch.manual_seed(0)
    buffer = torch.empty(1540 << 20, dtype=torch.uint8, device=DEVICE)
    for part in buffer.split(64 << 20):
        part.copy_(torch.randn(len(part), device=DEVICE).to(torch.float8_e4m3fn).view(torch.uint8))
    cases = [Case(s, kind, m, buffer) for model in models for kind in kinds for s in shapes_of(model) for m in tokens]
    wrong = [*check_quantised(), *compile_and_check(cases)]
    print(
        f"{time.perf_counter() - begun:.0f} s to compile and check; {len(wrong)} wrong", *wrong, sep="\n  ", flush=True
    )
    best: dict[str, EightTile] = {}
    rows: list[Row] = []
    for case in cases:
        rows += measure(case, best)
    for model in models:
        for m in tokens + large if any(KINDS[kind] != "none" for kind in kinds) else []:
            rows += measure_quantising(model, m)
        for kind in kinds:
            for m in steps:
                rows += chain(model, kind, m, buffer, best)
            for m in large:
                for shape in shapes_of(model)[:-1]:
                    rows += measure_large(shape, kind, m, buffer)
    print(f"{time.perf_counter() - begun:.0f} s in all")
    write_result(args.name, rows, {"gpu": torch.cuda.get_device_name(), "wrong": wrong}, show=False)


if __name__ == "__main__":
    main()
