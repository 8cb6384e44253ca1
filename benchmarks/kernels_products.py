"""The 8B shape's matrix products by cuBLAS in bfloat16: what steps of many tokens are bound by, and ways around it.

    python benchmarks/kernels_products.py

TFLOP/s by number of tokens and library; a step of 320 tokens (batch 64, four drafts) whole, in parts and transposed;
the MLP of 16,384 tokens in parts that fit the L2 cache; the residual added by the product against by the norm. Each
time is the median of a few calls over four layers' weights.
"""

from __future__ import annotations

import statistics
import sys
from collections.abc import Callable
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import torch
from torch import Tensor

from server.kernels.activation import silu_mul
from server.kernels.norm import add_rms_norm_, rms_norm

SHAPES = {"qkv": (6144, 4096), "out": (4096, 4096), "gate-up": (28672, 4096), "down": (4096, 14336)}
NUM_LAYERS, REPEATS = 4, 6
SPLITS = ((320,), (256, 64), (192, 128), (160, 160), (384,))
PARTS = (512, 1024, 2048, 4096, 8192, 16384)


def random(*shape: int) -> Tensor:
    return torch.randn(shape, device="cuda", dtype=torch.bfloat16) * 0.02


def median_us(run: Callable[[int], object]) -> float:
    """Microseconds of one layer's share of `run(layer)`, called for every layer in turn."""
    found: list[float] = []
    for repeat in range(REPEATS + 2):
        events = [torch.cuda.Event(enable_timing=True) for _ in range(2)]
        events[0].record()
        for layer in range(NUM_LAYERS):
            run(layer)
        events[1].record()
        events[1].synchronize()
        if repeat >= 2:
            found.append(1e3 * float(events[0].elapsed_time(events[1])) / NUM_LAYERS)
    return statistics.median(found)


def main() -> None:
    weights = {name: [random(*shape) for _ in range(NUM_LAYERS)] for name, shape in SHAPES.items()}
    up, out, down = weights["gate-up"], weights["out"], weights["down"]
    for library in ("cublas", "cublaslt"):
        torch.backends.cuda.preferred_blas_library(library)
        for num in (64, 128, 256, 320, 384, 512, 2048, 8192, 16384):
            cells = []
            for name, (n, k) in SHAPES.items():
                x, layers = random(num, k), weights[name]
                took = median_us(lambda i, x=x, layers=layers: torch.mm(x, layers[i].t()))  # type: ignore[misc]
                cells.append(f"{name} {took:8.1f} us {2 * num * n * k / took / 1e6:5.0f} TFLOP/s")
            print(f"{library:8} {num:6} tokens  {'  '.join(cells)}", flush=True)
    torch.backends.cuda.preferred_blas_library("cublas")
    for parts in SPLITS:
        xs = [random(num, 4096) for num in parts]
        took = median_us(lambda i, xs=xs: [torch.mm(x, up[i].t()) for x in xs])  # type: ignore[misc]
        print(f"gate-up in parts of {parts}: {took:.1f} us", flush=True)
    x = random(320, 4096)
    print(f"gate-up of 320 tokens, transposed: {median_us(lambda i: torch.mm(up[i], x.t())):.1f} us", flush=True)
    x = random(16384, 4096)
    for part in PARTS:

        def mlp(i: int, part: int = part) -> None:
            for begin in range(0, len(x), part):
                torch.mm(silu_mul(torch.mm(x[begin : begin + part], up[i].t())), down[i].t())

        print(f"MLP of 16384 tokens, {part} at a time: {median_us(mlp):.0f} us", flush=True)
    norm = torch.ones(4096, device="cuda", dtype=torch.bfloat16)
    for num in (64, 320, 2048, 16384):
        residual = random(num, 4096)
        for name, layers, inner in (("out", out, random(num, 4096)), ("down", down, random(num, 14336))):

            def by_norm(i: int, layers: list[Tensor] = layers, inner: Tensor = inner, x: Tensor = residual) -> None:
                add_rms_norm_(x, torch.mm(inner, layers[i].t()), norm, 1e-5)

            def by_product(i: int, layers: list[Tensor] = layers, inner: Tensor = inner, x: Tensor = residual) -> None:
                rms_norm(x.addmm_(inner, layers[i].t()), norm, 1e-5)

            found = f"{median_us(by_norm):.1f} us by the norm, {median_us(by_product):.1f} us by the product"
            print(f"residual after {name}, {num} tokens: added {found}", flush=True)


if __name__ == "__main__":
    main()
