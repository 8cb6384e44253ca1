"""The skinny linear kernels on one GPU: right, how near to the memory's speed, and what a whole small model takes.

    python benchmarks/kernels_linear.py [--models 8b] [--tokens 1,8] [--chain 1,8,16]

First all of SmolLM2-135M (kernels_chain.py). Then shapes of Llama-3.1-8B (or others), bf16, in one CUDA graph of many
launches over copies of the weights (more than 400 MB, so that the L2 cache holds what it holds in a step: nothing).
Microseconds a launch and the share of the bytes of the weights at 3.02 TB/s: the fastest tile with programmatic
dependent launch, every other tile, and cuBLAS's product alone, without what our kernels fuse.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks.common import Row, write_result
from benchmarks.kernels_chain import DTYPE, MAX_POSITIONS, chain, graph_us
from server.kernels.skinny import (
    linear_residual_reference,
    linear_residual_scaled_,
    norm_linear,
    norm_linear_reference,
)
from server.kernels.skinny_mlp import norm_gate_up, norm_gate_up_reference
from server.kernels.skinny_qkv import Heads, norm_qkv_rope, norm_qkv_rope_reference
from server.kernels.skinny_scaled import empty_scaled, scaled_reference
from server.kernels.skinny_tiles import Kind, TileConfig, block_m, configs_for
from server.models.config import parse_config
from server.models.shapes import SHAPES

PEAK = 3.02e12
ROTATED_BYTES = 420 << 20
MAX_LAUNCHES = 512
EPS = 1e-5


@dataclass(frozen=True)
class Shape:
    """One linear layer of a model: W [n, k] (GATE_UP: [2 n, k])."""

    name: str
    kind: Kind
    n: int
    k: int
    heads: Heads

    @property
    def rows(self) -> int:
        return 2 * self.n if self.kind is Kind.GATE_UP else self.n

    @property
    def bytes(self) -> int:
        return self.rows * self.k * DTYPE.itemsize


def shapes_of(model: str) -> list[Shape]:
    c = parse_config(SHAPES[{"135m": "smollm2-135m", "8b": "llama-3.1-8b", "1b": "llama-3.2-1b"}[model]])
    heads, hidden, queries = Heads(c.num_heads, c.num_kv_heads, c.head_dim), c.hidden_size, c.num_heads * c.head_dim
    return [
        Shape("qkv", Kind.QKV, heads.columns, hidden, heads),
        Shape("out", Kind.RESIDUAL, hidden, queries, heads),
        Shape("gate_up", Kind.GATE_UP, c.intermediate_size, hidden, heads),
        Shape("down", Kind.RESIDUAL, hidden, c.intermediate_size, heads),
        Shape("head", Kind.HEAD, c.vocab_size, hidden, heads),
    ]


class Case:
    """A shape at a number of tokens, over slices of one large buffer of weights."""

    def __init__(self, shape: Shape, num_tokens: int, buffer: Tensor) -> None:
        self.shape, self.num_tokens = shape, num_tokens
        self.failed: set[TileConfig] = set()
        device, count = buffer.device, shape.rows * shape.k
        copies = max(1, min(MAX_LAUNCHES, -(-ROTATED_BYTES // shape.bytes), buffer.numel() // count))
        self.weights = [buffer[i * count : (i + 1) * count].view(shape.rows, shape.k) for i in range(copies)]
        self.x = torch.randn(num_tokens, shape.k, device=device).to(DTYPE)
        self.norm = (1 + 0.1 * torch.randn(shape.k, device=device)).to(DTYPE)
        self.scaled = scaled_reference(self.x, self.norm)
        self.next_norm = (1 + 0.1 * torch.randn(shape.n, device=device)).to(DTYPE)
        self.out = torch.zeros(num_tokens, shape.n, dtype=DTYPE, device=device)
        self.next_scaled = empty_scaled(self.out)
        self.pool = torch.zeros(num_tokens, 2 * shape.heads.num_kv_heads, shape.heads.head_dim, device=device).to(DTYPE)
        self.q = torch.zeros(num_tokens, shape.heads.num_heads * shape.heads.head_dim, dtype=DTYPE, device=device)
        self.places = torch.arange(num_tokens, device=device)
        angles = torch.arange(MAX_POSITIONS, device=device).unsqueeze(1) * torch.rand(
            shape.heads.head_dim // 2, device=device
        )
        self.rotations = torch.stack((angles.cos(), angles.sin()), dim=-1)

    def launch(self, weight: Tensor, config: TileConfig) -> None:
        kind, heads = self.shape.kind, self.shape.heads
        if kind is Kind.QKV:
            norm_qkv_rope(
                self.scaled, EPS, weight, None, self.pool, self.places, self.places, self.rotations, heads,
                out=self.q, config=config, pdl=True, settled=True,
            )  # fmt: skip
        elif kind is Kind.RESIDUAL:
            linear_residual_scaled_(
                self.out, self.x, weight, None, self.next_norm, self.next_scaled, config=config, pdl=True
            )
        elif kind is Kind.GATE_UP:
            norm_gate_up(self.scaled, EPS, weight, out=self.out, config=config, pdl=True)
        else:
            norm_linear(self.scaled, EPS, weight, out=self.out, config=config, pdl=True, settled=True)

    def run(self, config: TileConfig) -> None:
        for weight in self.weights:
            self.launch(weight, config)

    def cublas(self) -> None:
        for weight in self.weights:
            F.linear(self.x, weight)

    def error(self, config: TileConfig) -> float:
        """Relative error against the reference, of whatever the kernel writes."""
        weight, kind, heads = self.weights[0], self.shape.kind, self.shape.heads
        self.out.normal_()
        if kind is Kind.QKV:
            pool = torch.zeros_like(self.pool)
            expected = norm_qkv_rope_reference(
                self.x, self.norm, EPS, weight, None, pool, self.places, self.places, self.rotations, heads
            )
            expected = torch.cat([expected, pool.flatten(1)], dim=1)
        elif kind is Kind.RESIDUAL:
            expected = linear_residual_reference(self.out, self.x, weight)
        elif kind is Kind.GATE_UP:
            expected = norm_gate_up_reference(self.x, self.norm, EPS, weight)
        else:
            expected = norm_linear_reference(self.x, self.norm, EPS, weight)
        self.launch(weight, config)
        found = torch.cat([self.q, self.pool.flatten(1)], dim=1) if kind is Kind.QKV else self.out
        error = float((found.float() - expected.float()).norm() / expected.float().norm())
        if kind is not Kind.RESIDUAL:
            return error
        ready = scaled_reference(self.out, self.next_norm)
        sums = float((self.next_scaled.squares.sum(1) / ready.squares.sum(1) - 1).abs().max())
        return max(error, sums, float((self.next_scaled.values - ready.values).float().abs().max()))


def compile_all(cases: list[Case]) -> Iterator[str]:
    """Compiles every candidate, many at a time, and checks it; yields what is wrong."""
    seen: dict[tuple[str, int, str], tuple[Case, TileConfig]] = {}
    for case in cases:
        shape = case.shape
        for config in candidates(case):
            seen.setdefault((f"{shape.kind}{shape.n}x{shape.k}", block_m(case.num_tokens), config.name), (case, config))
    with ThreadPoolExecutor(16) as pool:
        for (case, config), failure in zip(seen.values(), pool.map(_try_launch, seen.values()), strict=True):
            if failure:
                _exclude(cases, case, config)
                yield f"{case.shape.name} m{case.num_tokens} {config.name}: {failure}"
    for case in cases:
        for config in candidates(case):
            error = case.error(config)
            if not error < 1e-2:
                yield f"{case.shape.name} m{case.num_tokens} {config.name}: relative error {error:.2e}"


def _exclude(cases: list[Case], failing: Case, config: TileConfig) -> None:
    for case in cases:
        if case.shape == failing.shape:
            case.failed.add(config)


def _try_launch(work: tuple[Case, TileConfig]) -> str:
    case, config = work
    try:
        case.launch(case.weights[0], config)
        torch.cuda.synchronize()
    except Exception as error:  # noqa: BLE001  # a candidate that does not run is a result
        return f"{type(error).__name__}: {str(error)[:200]}"
    return ""


def candidates(case: Case) -> list[TileConfig]:
    found = configs_for(case.shape.kind, case.num_tokens, case.shape.n, case.shape.k)
    return [c for c in found if c not in case.failed]


def measure(model: str, case: Case) -> list[Row]:
    """Prints a line and gives the rows of a case."""
    launches, least = len(case.weights), case.shape.bytes / PEAK * 1e6
    times = {c: graph_us(partial(case.run, c), launches, 3) for c in candidates(case)}
    best = min(times, key=lambda c: statistics.median(times[c]))
    case.cublas()
    cublas = graph_us(case.cublas, launches, 3)
    found, floor = statistics.median(times[best]), statistics.median(cublas)
    others = "  ".join(f"[{c.name.replace(' prefetch1024', '')}] {statistics.median(t):.1f}" for c, t in times.items())
    print(
        f"{model:5} {case.shape.name:8} {case.shape.k:6}->{case.shape.rows:6} M={case.num_tokens:3}: "
        f"{found:7.2f} us {least / found:5.0%}  cuBLAS {floor:7.2f} {least / floor:5.0%} | {others}",
        flush=True,
    )
    prefix = f"h100/linear_us/{model}/{case.shape.name}/m{case.num_tokens}"
    named = {"ours": times[best], "cublas": cublas}
    return [
        Row(f"{prefix}/{name}", round(statistics.median(t), 3), "us", (round(min(t), 3), round(max(t), 3)), best.name)
        for name, t in named.items()
    ]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", default="8b")
    parser.add_argument("--tokens", default="1,8")
    parser.add_argument("--chain", default="1,8,16", help="sizes of step of the 135M; empty: none")
    args = parser.parse_args()
    tokens, steps = ([int(m) for m in listed.split(",") if m] for listed in (args.tokens, args.chain))
    begun = time.perf_counter()
    torch.manual_seed(0)
    buffer = torch.empty((1060 << 20) // DTYPE.itemsize, dtype=DTYPE, device="cuda").normal_(0.0, 0.02)
    named = [(m, Case(shape, n, buffer)) for m in args.models.split(",") for shape in shapes_of(m) for n in tokens]
    small = [Case(shape, n, buffer) for shape in shapes_of("135m") for n in steps]  # the chain finds them compiled
    wrong = list(compile_all(small + [case for _, case in named]))
    print(
        f"{time.perf_counter() - begun:.0f} s to compile and check; {len(wrong)} wrong", *wrong, sep="\n  ", flush=True
    )
    rows = chain(steps) if steps else []
    print(f"{time.perf_counter() - begun:.0f} s", flush=True)
    for model, case in named:
        rows += measure(model, case)
    print(f"{time.perf_counter() - begun:.0f} s in all")
    write_result("kernels_linear", rows, {"gpu": torch.cuda.get_device_name(), "wrong": wrong})


if __name__ == "__main__":
    main()
