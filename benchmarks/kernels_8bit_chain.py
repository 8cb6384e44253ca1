"""Low-precision shapes, weights and whole layers for kernels_8bit.py: quantising, many tokens, a model's layers."""

from __future__ import annotations

import statistics
import sys
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks.common import Row
from benchmarks.kernels_chain import graph_us
from server.kernels.eightbit_large import dequantized_groups, large_parts, total
from server.kernels.eightbit_tiles import BYTE, EightTile, Weight
from server.kernels.int4_product import WORD
from server.kernels.quantize import (
    Precision,
    Sums,
    add_norm_quantize_,
    norm_quantize,
    quantize,
    silu_mul_quantize,
)
from server.kernels.skinny_qkv import Heads
from server.kernels.skinny_tiles import Kind
from server.models.llama_kernels_8bit import LowLayer, LowPlan, LowStep, LowWay, kernel_key
from server.models.norm import RMSNorm
from server.quant.low import LowLinear

PEAK, EPS, DTYPE = 3.02e12, 1e-5, torch.bfloat16
DEVICE, PDL = "cuda", True
ROTATED_BYTES, MAX_LAUNCHES = 420 << 20, 256
MODELS = {
    "8b": (4096, 14336, Heads(32, 8, 128), 128256, 32),
    "7b": (4096, 11008, Heads(32, 32, 128), 32000, 32),
    "135m": (576, 1536, Heads(9, 3, 64), 49152, 30),
}
"""Hidden size, intermediate size, heads, vocabulary, layers."""
KINDS: dict[str, Precision] = {
    "fp8": "fp8",
    "int8": "int8",
    "w8a16": "none",
    "w4a8": "int8",
    "w4a8-fp8": "fp8",
    "int4": "none",
    "int4-min": "none",
}


@dataclass(frozen=True)
class Shape:
    """One linear layer of a model; W has `rows` (GATE_UP: twice the columns of the result)."""

    model: str
    name: str
    kind: Kind
    n: int
    k: int
    heads: Heads

    @property
    def rows(self) -> int:
        return 2 * self.n if self.kind is Kind.GATE_UP else self.n


def shapes_of(model: str) -> list[Shape]:
    hidden, inner, heads, vocab, _ = MODELS[model]
    queries = heads.num_heads * heads.head_dim
    sizes = [
        ("qkv", Kind.QKV, heads.columns, hidden),
        ("out", Kind.RESIDUAL, hidden, queries),
        ("gate_up", Kind.GATE_UP, inner, hidden),
        ("down", Kind.RESIDUAL, hidden, inner),
        ("head", Kind.HEAD, vocab, hidden),
    ]
    return [Shape(model, name, kind, n, k, heads) for name, kind, n, k in sizes]


def weights_of(shape: Shape, kind: str, buffer: Tensor, at_most: int = MAX_LAUNCHES) -> list[Weight]:
    """Slices of `buffer` (bytes that are finite as float8) as weights, more than the L2 cache holds."""
    words = kind.startswith("int4")
    group = (64 if shape.k % 128 else 128) if words or kind.startswith("w4") else 0
    per = WORD if words else BYTE
    width = -(-shape.k // (per * group)) * (per // 2) * group if group else shape.k  # bytes
    count = shape.rows * width
    copies = max(1, min(at_most, -(-ROTATED_BYTES // count), buffer.numel() // count))
    dtype = {"fp8": torch.float8_e4m3fn}.get(kind, torch.int16 if words else torch.int8)
    sizes = {"fp8": 1.0, "int8": 70.0, "w8a16": 70.0, "w4a8": 80.0, "w4a8-fp8": 0.01, "int4": 5.0, "int4-min": 5.0}
    size = (2 * width // group, shape.rows) if group else (shape.rows,)
    scales = (0.5 + torch.rand(size, device=buffer.device)) / (sizes[kind] * shape.k**0.5)
    if words:
        scales = scales.to(DTYPE)
    minimum = kind == "int4-min"
    if minimum:
        scales = torch.cat([scales, -7.5 * scales])
    parts = [buffer[i * count : (i + 1) * count].view(dtype).view(shape.rows, -1) for i in range(copies)]
    return [Weight(values, scales, shape.k, group, minimum) for values in parts]


def plain(weight: Weight, activations: torch.dtype) -> Tensor:
    """W [N, K] float32."""
    if weight.per == WORD:
        return _of_words(weight)
    if weight.group:
        return dequantized_groups(weight, activations)
    return weight.values.float() * weight.scales[:, None]


def _of_words(weight: Weight) -> Tensor:
    """By torch's operations, apart from the kernels' own way of unpacking."""
    words = weight.values.to(torch.int32).view(weight.rows, -1, 1, weight.group)
    shifts = torch.arange(0, 16, 4, device=words.device).view(1, 1, WORD, 1)
    numbers = ((words >> shifts) & 15).flatten(1, 2).float()
    scales, *least = (table.t()[:, :, None].float() for table in weight.scales.chunk(2 if weight.minimum else 1))
    plain = numbers * scales + least[0] if least else (numbers - 8) * scales
    return plain.flatten(1)[:, : weight.columns]


def row(case: str, took: list[float], note: str = "", unit: str = "us") -> Row:
    return Row(
        f"h100/{case}", round(statistics.median(took), 3), unit, (round(min(took), 3), round(max(took), 3)), note
    )


def _each(run: Callable[[int], object], count: int) -> None:
    for i in range(count):
        run(i)


def measure_large(shape: Shape, kind: str, num_tokens: int, buffer: Tensor) -> list[Row]:
    """Products of many tokens, scaled and rounded, beside bfloat16's."""
    weights = weights_of(shape, kind, buffer, 4)
    x = torch.randn(num_tokens, shape.k, device=buffer.device).to(DTYPE)
    q, wide = quantize(x, KINDS[kind]), [plain(w, torch.int8).to(DTYPE) for w in weights]
    ways: dict[str, Callable[[int], object]] = {
        "parts": lambda i: large_parts(q, weights[i], DTYPE),
        "whole": lambda i: total(large_parts(q, weights[i], DTYPE), DTYPE),
        "bf16": lambda i: F.linear(x, wide[i]),
    }
    rows, told = [], []
    for name, way in ways.items():
        way(0)
        took = graph_us(partial(_each, way, len(weights)), len(weights), 3)
        rate = 2 * num_tokens * shape.rows * shape.k / statistics.median(took) / 1e6
        told.append(f"{name} {statistics.median(took):8.1f} us {rate:5.0f} TFLOP/s")
        rows.append(row(f"low_us/{shape.model}/{kind}/{shape.name}/m{num_tokens}/{name}", took))
    print(f"{shape.model}/{kind}/{shape.name}/m{num_tokens}  {'  '.join(told)}", flush=True)
    return rows


def measure_quantising(model: str, num_tokens: int) -> list[Row]:
    """The launches between products, as a chain of 32 that depend on each other."""
    hidden, inner, _, _, _ = MODELS[model]
    x = torch.randn(num_tokens, hidden, device=DEVICE).to(DTYPE)
    norm, wide = torch.ones(hidden, device=DEVICE, dtype=DTYPE), torch.randn(num_tokens, inner, device=DEVICE).to(DTYPE)
    both = torch.randn(1, num_tokens, 2 * inner, device=DEVICE).to(DTYPE)
    ways: dict[str, Callable[[], object]] = {
        "norm": lambda: norm_quantize(x, norm, EPS, "fp8", pdl=PDL),
        "row": lambda: quantize(wide, "fp8", pdl=PDL),
        "silu": lambda: silu_mul_quantize(Sums(both), "fp8", DTYPE, pdl=PDL),
    }
    for parts in (1, 4, 8) if num_tokens <= 64 else (1,):
        sums = Sums(torch.zeros(parts, num_tokens, hidden, device=DEVICE, dtype=torch.float32))
        ways[f"add{parts}-norm"] = partial(add_norm_quantize_, x, sums, norm, EPS, "fp8", pdl=PDL)
    rows = []
    for name, way in ways.items():
        way()
        took = graph_us(partial(_each, lambda i, way=way: way(), 32), 32, 3)  # type: ignore[misc]
        rows.append(row(f"low_us/{model}/quantising-{name}/m{num_tokens}", took))
    told = "  ".join(f"{r.case.split('/')[-2].removeprefix('quantising-')} {r.value:.2f}" for r in rows)
    print(f"{model} quantising, {num_tokens} tokens, us: {told}", flush=True)
    return rows


def layers_of(model: str, kind: str, buffer: Tensor) -> tuple[list[LowLayer], LowLinear]:
    """As many different layers as fit in `buffer` beside the head, over and over; nothing in it is in two weights."""
    hidden, _, _, _, num_layers = MODELS[model]
    norm = RMSNorm(torch.ones(hidden, device=buffer.device, dtype=DTYPE), EPS)
    *shapes, head_shape = shapes_of(model)
    begin = 0

    def linear(shape: Shape) -> LowLinear:
        nonlocal begin
        weight = weights_of(shape, kind, buffer[begin:], 1)[0]
        begin += weight.values.nbytes
        return LowLinear(weight, None, KINDS[kind], None, kind)

    head = linear(head_shape)
    layers: list[LowLayer] = []
    size = 0
    while len(layers) < num_layers and begin + size <= buffer.numel():
        before = begin
        qkv, out, up, down = (linear(shape) for shape in shapes)
        size = begin - before
        layers.append(LowLayer(norm, qkv, None, None, out, norm, up, down, None, True))
    return [layers[i % len(layers)] for i in range(num_layers)], head


def chain(model: str, kind: str, num_tokens: int, buffer: Tensor, best: dict[str, EightTile]) -> list[Row]:
    """All layers of a model and its head in one graph, attention left out."""
    hidden, _, heads, _, num_layers = MODELS[model]
    tiles = {s.name: best.get(f"{model}/{kind}/{s.name}/m{num_tokens}") for s in shapes_of(model)}
    layers, head = layers_of(model, kind, buffer)
    first = layers[0]
    linears = {"qkv": first.qkv, "out": first.out, "gate_up": first.gate_up, "down": first.down, "head": head}
    chosen = {(role, kernel_key(low)): tile for role, low in linears.items() if (tile := tiles[role]) is not None}
    plan = LowPlan(chosen)
    places = torch.arange(num_tokens, device=buffer.device)
    pool = torch.zeros(num_tokens, 2 * heads.num_kv_heads, heads.head_dim, dtype=DTYPE, device=buffer.device)
    rotations = torch.zeros(max(128, num_tokens), heads.head_dim // 2, 2, device=buffer.device)
    step = LowStep(places, places, lambda q, pool, window: q.flatten(1), plan)
    x, norm = torch.zeros(num_tokens, hidden, dtype=DTYPE, device=buffer.device), layers[0].input_norm
    rows, told = [], []
    for pdl in (PDL, False):
        way = LowWay(heads, rotations, DTYPE, pdl=pdl)

        def run(way: LowWay = way) -> None:
            ready = way.layers(x, layers, [pool] * num_layers, step, norm, head)
            way.logits(x, ready, norm, head, None, plan)

        run()
        took = graph_us(run, 1000)
        told.append(f"{statistics.median(took):.3f} ms{'' if pdl else ' without PDL'}")
        name = f"low_ms/{model}/{kind}/layers-head/m{num_tokens}/{'pdl' if pdl else 'no-pdl'}"
        rows.append(row(name, took, unit="ms"))
    print(
        f"{model} {kind} {num_layers} layers and head, no attention, {num_tokens} tokens: {', '.join(told)}", flush=True
    )
    return rows
