"""Chooses the tiles of low-precision layers by measuring, as llama_tuning.py does: in order, overlapping."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import torch

from server.kernels.eightbit_tiles import EightTile, candidates
from server.kernels.skinny_tiles import Kind
from server.models.llama_kernels_8bit import Low, LowLayer, LowLinear, LowPlan, LowStep, LowWay
from server.models.norm import RMSNorm

Choose = Callable[[str, Sequence[tuple[str, Callable[[], object]]]], str]
"""`Tuner.choose` of server/kernels/tuning.py: (question, (name, what to time) ...) -> name of the fastest."""

TUNED_BYTES = 64 << 20
"""Layers of so many bytes are run through."""


def tuned_low_plan(
    way: LowWay, layers: Sequence[LowLayer], norm: RMSNorm, head: Low, num_tokens: int, choose: Choose
) -> LowPlan:
    """The fastest tiles of a step of `num_tokens` <= 64; layers are taken to be like the first."""
    first = layers[0]
    fields = [
        ("qkv", Kind.QKV, first.qkv),
        ("out", Kind.RESIDUAL, first.out),
        ("gate_up", Kind.GATE_UP, first.gate_up),
        ("down", Kind.RESIDUAL, first.down),
        ("head", Kind.HEAD, head),
    ]
    used = layers[: max(1, -(-TUNED_BYTES // _bytes(first)))]
    plan = LowPlan()
    shapes = ",".join(f"{low.path}:{low.out_features}" for _, _, low in fields)
    for field, kind, low in fields:
        if not isinstance(low, LowLinear):
            continue
        weight = low.weight
        columns = weight.rows // (2 if kind is Kind.GATE_UP else 1)
        size = 1 if low.precision != "none" else way.dtype.itemsize
        tiles = {t.name: t for t in candidates(kind, num_tokens, columns, weight.columns, size, weight.group)}
        plans = {name: _with(plan, field, tile) for name, tile in tiles.items()}
        run = _Run(way, used, norm, head, num_tokens)
        question = f"llama-low/{field}/m{num_tokens}/{shapes}x{weight.columns}/{str(way.dtype)[6:]}/pdl{int(way.pdl)}"
        plan = plans[choose(question, [(name, _bound(run, p)) for name, p in plans.items()])]
    return plan


class _Run:
    """The linear layers of a step without attention, on buffers of their own, then the head."""

    def __init__(self, way: LowWay, layers: Sequence[LowLayer], norm: RMSNorm, head: Low, num_tokens: int) -> None:
        self.way, self.layers, self.norm, self.head = way, layers, norm, head
        heads, device = way.heads, norm.weight.device
        self.x = torch.zeros(num_tokens, len(norm.weight), dtype=way.dtype, device=device)
        self.pool = torch.zeros(num_tokens, 2 * heads.num_kv_heads, heads.head_dim, dtype=way.dtype, device=device)
        self.places = torch.arange(num_tokens, device=device)

    def __call__(self, plan: LowPlan) -> None:
        step = LowStep(self.places, self.places, lambda q, pool, window: q.flatten(1), plan)
        pools = [self.pool] * len(self.layers)
        ready = self.way.layers(self.x, self.layers, pools, step, self.norm, self.head)
        self.way.logits(self.x, ready, self.norm, self.head, None, plan)


def _bound(run: _Run, plan: LowPlan) -> Callable[[], object]:
    return lambda: run(plan)


def _with(plan: LowPlan, field: str, tile: EightTile) -> LowPlan:
    changes: dict[str, Any] = {field: tile}
    return replace(plan, **changes)


def _bytes(layer: LowLayer) -> int:
    lows = (layer.qkv, layer.out, layer.gate_up, layer.down)
    return 1 + sum(low.weight.values.nbytes for low in lows if isinstance(low, LowLinear))
