"""Chooses the tiles of low-precision layers by measuring, as llama_tuning.py does: in order, overlapping."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence

import torch

from server.kernels.skinny_tiles import Kind
from server.models.llama_kernels_8bit import LowLayer, LowPlan, LowStep, LowWay, Role, kernel_key
from server.models.norm import RMSNorm
from server.quant.low import Low

Choose = Callable[[str, Sequence[tuple[str, Callable[[], object]]]], str]
"""`Tuner.choose` of server/kernels/tuning.py: (question, (name, what to time) ...) -> name of the fastest."""

TUNED_BYTES = 64 << 20
"""Layers of so many bytes are run through."""

_KINDS = {"qkv": Kind.QKV, "out": Kind.RESIDUAL, "gate_up": Kind.GATE_UP, "down": Kind.RESIDUAL, "head": Kind.HEAD}


def tuned_low_plan(
    way: LowWay, layers: Sequence[LowLayer], norm: RMSNorm, head: Low, num_tokens: int, choose: Choose
) -> LowPlan:
    """The fastest way to compute each product in a step of `num_tokens` <= 64, layers alike asked for once."""
    plan = LowPlan()
    for role, low, used in _different(layers, head):
        key = role, kernel_key(low)
        found = {c.name: c for c in low.candidates(_KINDS[role], num_tokens, way.dtype)}
        if not found:
            continue
        plans = {name: LowPlan({**plan.choices, key: choice}) for name, choice in found.items()}
        run = _Run(way, used, norm, head, num_tokens)
        around = ",".join(kernel_key(item) for item in _linears(used[0], head).values())
        dtype = str(way.dtype).removeprefix("torch.")
        question = f"llama-low/{role}/m{num_tokens}/{key[1]}/{around}/{dtype}/pdl{int(way.pdl)}"
        plan = plans[choose(question, [(name, _bound(run, p)) for name, p in plans.items()])]
    return plan


def _different(layers: Sequence[LowLayer], head: Low) -> Iterator[tuple[Role, Low, Sequence[LowLayer]]]:
    """(role, the first of each kind of linear layer, layers to run from it on)."""
    seen: set[tuple[Role, str]] = set()
    for i, layer in enumerate(layers):
        for role, low in _linears(layer, head).items():
            key = role, kernel_key(low)
            if key not in seen:
                seen.add(key)
                yield role, low, layers[i : i + max(1, -(-TUNED_BYTES // _bytes(layer)))]


def _linears(layer: LowLayer, head: Low) -> dict[Role, Low]:
    return {"qkv": layer.qkv, "out": layer.out, "gate_up": layer.gate_up, "down": layer.down, "head": head}


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


def _bytes(layer: LowLayer) -> int:
    return 1 + layer.qkv.weight_bytes + layer.out.weight_bytes + layer.gate_up.weight_bytes + layer.down.weight_bytes
