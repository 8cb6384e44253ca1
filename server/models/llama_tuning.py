"""Chooses how each tier of step sizes computes its linear layers, by measuring.

A layer's linears run as they do in a step (in order, overlapping, without attention) over several layers, and one
choice is varied at a time: a tile that is fast alone may keep the next kernel from starting early.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from server.kernels.skinny_scaled import empty_scaled
from server.kernels.skinny_tiles import Kind, TileConfig, configs_for
from server.models.llama_kernels import TIERS, LlamaKernels, Path, Plan
from server.models.llama_low import LlamaLowKernels
from server.models.llama_tuning_8bit import tuned_low_plan
from server.quant.dense import as_dense

Choose = Callable[[str, Sequence[tuple[str, Callable[[], object]]]], str]
"""`Tuner.choose` of server/kernels/tuning.py: (question, (name, what to time) ...) -> name of the fastest."""

TUNED_BYTES = 64 << 20
"""Layers of so many bytes are run through: enough of them that what happens between launches counts."""


def tune(kernels: LlamaKernels | LlamaLowKernels, choose: Choose, tiers: Sequence[int] = TIERS) -> None:
    """Sets the plan of every tier to the fastest that `choose` finds. In deterministic mode nothing is to choose."""
    if kernels.deterministic:
        return
    for tier in tiers:
        if isinstance(kernels, LlamaKernels):
            kernels.plans[tier] = tuned_plan(kernels, choose, tier)
        else:
            k = kernels
            k.plans[tier] = tuned_low_plan(k.way, k.layers, k.model.norm, k.head, tier, choose)


def tuned_plan(kernels: LlamaKernels, choose: Choose, num_tokens: int) -> Plan:
    """The fastest plan of a step of `num_tokens`: a tile for each linear layer, then fused or not."""
    work = Workload(kernels, num_tokens)
    plan = Plan()
    for field, kind, n, k in work.shapes():
        candidates = {c.name: c for c in configs_for(kind, num_tokens, n, k, work.x.element_size())}
        run = work.head if kind is Kind.HEAD else work.layers
        plans = {name: _with_tile(plan, field, tile) for name, tile in candidates.items()}
        found = choose(work.question(field), [(name, _bound(run, p)) for name, p in plans.items()])
        plan = plans[found]
    paths = [(path.value, _bound(work.layers, replace(plan, path=path))) for path in Path]
    plan = replace(plan, path=Path(choose(work.question("layers"), paths)))
    paths = [(path.value, _bound(work.head, replace(plan, head_path=path))) for path in Path]
    return replace(plan, head_path=Path(choose(work.question("logits"), paths)))


def _with_tile(plan: Plan, field: str, tile: TileConfig) -> Plan:
    changes: dict[str, Any] = {field: tile}
    return replace(plan, **changes)


def _bound(run: Callable[[Plan], object], plan: Plan) -> Callable[[], object]:
    return lambda: run(plan)


class Workload:
    """Steps of `num_tokens` without attention, on buffers of their own."""

    def __init__(self, kernels: LlamaKernels, num_tokens: int) -> None:
        model, h = kernels.model, kernels.heads
        self.kernels, self.num_tokens = kernels, num_tokens

        def zeros(*shape: int, dtype: torch.dtype = model.dtype) -> Tensor:
            return torch.zeros(shape, dtype=dtype, device=model.device)

        self.x = zeros(num_tokens, model.embedding.shape[1])
        self.scaled = empty_scaled(self.x)
        self.scaled.values.zero_()
        self.scaled.squares.zero_()
        self.mixed = zeros(num_tokens, h.num_heads * h.head_dim)
        self.pool = zeros(num_tokens, 2 * h.num_kv_heads, h.head_dim)
        self.positions = zeros(num_tokens, dtype=torch.int64)
        self.places = torch.arange(num_tokens, device=model.device)
        first = model.layers[0]
        one = sum(as_dense(linear).weight.nbytes for linear in (first.qkv, first.out, first.gate_up, first.down))
        self.num_layers = min(len(model.layers), max(1, -(-TUNED_BYTES // one)))

    def shapes(self) -> list[tuple[str, Kind, int, int]]:
        """(field of Plan, kind, N, K) of what has tiles to choose."""
        layer, head = self.kernels.model.layers[0], self.kernels.model.head
        return [
            ("qkv", Kind.QKV, *as_dense(layer.qkv).weight.shape),
            ("out", Kind.RESIDUAL, *as_dense(layer.out).weight.shape),
            (
                "gate_up",
                Kind.GATE_UP,
                as_dense(layer.gate_up).weight.shape[0] // 2,
                as_dense(layer.gate_up).weight.shape[1],
            ),
            ("down", Kind.RESIDUAL, *as_dense(layer.down).weight.shape),
            ("head", Kind.HEAD, *as_dense(head).weight.shape),
        ]

    def question(self, field: str) -> str:
        """What is measured, as a key: the answer holds for the same shapes, dtype and launches."""
        layer = self.kernels.model.layers[0]
        shapes = ",".join(f"{n}x{k}" for _, _, n, k in self.shapes())
        has = {"bias": layer.qkv.bias is not None, "qknorm": layer.q_norm is not None, "pdl": self.kernels.pdl}
        extras = "+".join(name for name, there in has.items() if there) or "plain"
        return f"llama-scaled/{field}/m{self.num_tokens}/{shapes}/{str(self.x.dtype).removeprefix('torch.')}/{extras}"

    def layers(self, plan: Plan) -> None:
        """The linear layers of a step, on `plan.path`."""
        run, layers = self.kernels, self.kernels.model.layers[: self.num_layers]
        normed = self.x
        for layer in layers:
            if plan.path is Path.FUSED:
                run.fused_queries(layer, self.scaled, self.pool, self.positions, self.places, plan)
                run.fused_rest(layer, self.x, self.scaled, self.mixed, layer.input_norm, plan)
            else:
                run.plain_queries(layer, normed, self.pool, self.positions, self.places)
                normed = run.plain_rest(layer, self.x, self.mixed, layer.input_norm)

    def head(self, plan: Plan) -> None:
        """The final norm and the head for all tokens, on `plan.head_path`."""
        self.kernels.logits(self.x, self.scaled, None, plan)
