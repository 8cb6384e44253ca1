"""A whole small model on one GPU by kernels: what each kernel of its layers adds, and its forward pass.

    python benchmarks/kernels_chain.py [--model smollm2-135m] [--tokens 1,8,16,40,64]

CUDA graphs of SmolLM2-135M's shape with random bf16 weights. Microseconds a layer with attention stubbed, and what each
kernel adds to them; milliseconds a forward pass with tuned tiles, with and without programmatic dependent launch, and
through cuBLAS. The forward pass sees 256 tokens of context; five tokens a row where that divides the step.
"""

from __future__ import annotations

import argparse
import statistics
import sys
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import torch
from torch import Tensor

from benchmarks.common import Row, write_result
from server.kernels.embedding import embed_scaled
from server.kernels.norm import rms_norm
from server.kernels.paged import PagedRows
from server.kernels.skinny import linear_residual_scaled_
from server.kernels.skinny_mlp import norm_gate_up
from server.models.config import parse_config
from server.models.llama import LlamaModel
from server.models.llama_kernels import LlamaKernels, Plan
from server.models.llama_kernels import Path as Way
from server.models.llama_tuning import tuned_plan
from server.models.random_weights import llama_weights
from server.models.shapes import SHAPES
from server.quant.dense import as_dense

CONTEXT = 256
BLOCK_SIZE = 16
MAX_POSITIONS = 8192
DTYPE = torch.bfloat16


def graph_us(run: Callable[[], object], launches: int, repeats: int = 5) -> list[float]:
    """Microseconds a launch, each of `repeats` replays of one graph; run it once before."""
    graph = torch.cuda.CUDAGraph()
    torch.cuda.synchronize()
    with torch.cuda.graph(graph):
        run()
    graph.replay()
    took = []
    for _ in range(repeats):
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        graph.replay()
        end.record()
        end.synchronize()
        took.append(float(start.elapsed_time(end)) * 1e3 / launches)
    return took


def choose_fastest(question: str, options: Sequence[tuple[str, Callable[[], object]]]) -> str:
    """As the engine's tuner chooses, without its cache."""
    times: dict[str, float] = {}
    for name, run in options:
        run()
        times[name] = min(graph_us(run, 1, 5))
    return min(times, key=lambda name: times[name])


def chain(num_tokens: Sequence[int], name: str = "smollm2-135m") -> list[Row]:
    """Rows for every size of step, way and launch; prints a line for each, and what each kernel adds."""
    config = parse_config(SHAPES[name])
    device = torch.device("cuda")
    weights = llama_weights(config, DTYPE, device)
    model = LlamaModel(config, weights.get, weights.has, MAX_POSITIONS)
    rows: list[Row] = []
    for tokens in num_tokens:
        plan = tuned_plan(LlamaKernels(model), choose_fastest, tokens)
        tiles = {field: getattr(plan, field) for field in ("qkv", "out", "gate_up", "down", "head")}
        told = "  ".join(f"{field} [{tile.name.replace(' prefetch1024', '')}]" for field, tile in tiles.items())
        print(f"{name} M={tokens} layers {plan.path.value}, head {plan.head_path.value}  {told}", flush=True)
        fused = replace(plan, path=Way.FUSED)
        rows += breakdown(LlamaKernels(model), fused, tokens, name)
        ways = {"tuned": (plan, True), "tuned-no-pdl": (plan, False), "cublas": (Plan(Way.CUBLAS, Way.CUBLAS), True)}
        for label, (way, pdl) in ways.items():
            kernels = LlamaKernels(model, pdl=pdl)
            kernels.plans = {64: way}
            whole = whole_forward(kernels, tokens)
            whole()
            took = graph_us(whole, 1000)
            print(f"{name} M={tokens:3} {label:13} forward {statistics.median(took):.3f} ms", flush=True)
            rows.append(_row(f"h100/chain_ms/{name}/forward/m{tokens}/{label}", took, "ms"))
    return rows


def _row(case: str, took: list[float], unit: str) -> Row:
    return Row(case, round(statistics.median(took), 4), unit, (round(min(took), 4), round(max(took), 4)))


PARTS = ("qkv", "out", "gate_up", "down")


def breakdown(kernels: LlamaKernels, plan: Plan, num_tokens: int, name: str) -> list[Row]:
    """What each linear kernel of a layer adds to all layers in a row: the time of all of them less that without it.

    A small dependent kernel stands in attention's place. `alone`: one layer's kernel after the other's, nothing else.
    """
    layers = len(kernels.model.layers)
    steps = LayerSteps(kernels, plan, num_tokens)
    sets = {"all": PARTS, "none": ()} | {f"less {p}": tuple(q for q in PARTS if q != p) for p in PARTS}
    times = {label: _timed(partial(steps.run, parts, True), layers) for label, parts in sets.items()}
    alone = {part: _timed(partial(steps.run, (part,), False), layers) for part in PARTS}
    head = _timed(partial(kernels.logits, steps.x, steps.scaled, None, plan), 1)
    whole = statistics.median(times["all"])
    adds = {p: whole - statistics.median(times[f"less {p}"]) for p in PARTS}
    told = "  ".join(f"{p} +{adds[p]:.2f} (alone {statistics.median(alone[p]):.2f})" for p in PARTS)
    stub = statistics.median(times["none"])
    print(f"{name} M={num_tokens:3} us a layer: {whole:.2f}  stub {stub:.2f}  {told}  head {head[0]:.1f}", flush=True)
    prefix = f"h100/chain_us/{name}"
    rows = [_row(f"{prefix}/layer/m{num_tokens}", times["all"], "us"), _row(f"{prefix}/head/m{num_tokens}", head, "us")]
    rows += [Row(f"{prefix}/{p}/m{num_tokens}/adds", round(adds[p], 3), "us") for p in PARTS]
    return rows + [_row(f"{prefix}/{p}/m{num_tokens}/alone", alone[p], "us") for p in PARTS]


def _timed(run: Callable[[], object], launches: int) -> list[float]:
    run()
    return graph_us(run, launches)


class LayerSteps:
    """The fused kernels of all layers, each on its own or not at all."""

    def __init__(self, kernels: LlamaKernels, plan: Plan, num_tokens: int) -> None:
        model, h = kernels.model, kernels.heads
        self.kernels, self.plan, self.ids = kernels, plan, _buffer(num_tokens)
        self.x, self.scaled = embed_scaled(self.ids, model.embedding, model.norm.weight)
        make = partial(torch.zeros, dtype=DTYPE, device=self.x.device)
        self.pool = make(num_tokens, 2 * h.num_kv_heads, h.head_dim)
        self.mixed = make(num_tokens, h.num_heads * h.head_dim)
        self.hidden = make(num_tokens, model.config.intermediate_size)
        self.stub = make(h.num_heads * h.head_dim)

    def run(self, parts: Sequence[str], stubbed: bool) -> None:
        """The kernels named, layer by layer; `stubbed` with a norm of the queries after qkv."""
        k, plan, scaled = self.kernels, self.plan, self.scaled
        mixed, hidden = self.mixed, self.hidden
        for layer in k.model.layers:
            norm, up = layer.post_norm, as_dense(layer.gate_up)
            q = mixed
            if "qkv" in parts:
                q = k.fused_queries(layer, scaled, self.pool, self.ids, self.ids, plan).view_as(mixed)
            if stubbed:
                mixed = rms_norm(q, self.stub, norm.eps)
            if "out" in parts:
                out = as_dense(layer.out)
                linear_residual_scaled_(
                    self.x, mixed, out.weight, out.bias, norm.weight, scaled, config=plan.out, pdl=k.pdl
                )
            if "gate_up" in parts:
                hidden = norm_gate_up(scaled, norm.eps, up.weight, up.bias, config=plan.gate_up, pdl=k.pdl)
            if "down" in parts:
                down = as_dense(layer.down)
                linear_residual_scaled_(
                    self.x, hidden, down.weight, down.bias, norm.weight, scaled, config=plan.down, pdl=k.pdl
                )


_BUFFERS: dict[int, Tensor] = {}


def _buffer(num_tokens: int) -> Tensor:
    if num_tokens not in _BUFFERS:
        _BUFFERS[num_tokens] = torch.arange(num_tokens, device="cuda")
    return _BUFFERS[num_tokens]


def whole_forward(kernels: LlamaKernels, num_tokens: int) -> Callable[[], object]:
    """A step of `num_tokens`: 5 a row where that divides, else 1."""
    model, device = kernels.model, kernels.model.device
    width = 5 if num_tokens % 5 == 0 else 1
    num_rows, blocks = num_tokens // width, CONTEXT // BLOCK_SIZE + 1
    tables = torch.arange(1, 1 + num_rows * blocks, device=device, dtype=torch.int32).view(num_rows, blocks)
    starts = torch.full((num_rows,), CONTEXT - width, device=device)
    rows = PagedRows(torch.arange(num_rows, device=device), starts, tables, BLOCK_SIZE, CONTEXT, width)
    places = (1 + num_rows * blocks) * BLOCK_SIZE
    c = model.config
    pools = [torch.zeros(places, 2 * c.num_kv_heads, c.head_dim, dtype=DTYPE, device=device) for _ in model.layers]
    positions = (starts.unsqueeze(1) + torch.arange(width, device=device)).flatten()
    at = tables.long()[:, CONTEXT // BLOCK_SIZE - 1].repeat_interleave(width) * BLOCK_SIZE + positions % BLOCK_SIZE
    return partial(kernels, _buffer(num_tokens), pools, rows, positions, at, None)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="smollm2-135m", choices=SHAPES)
    parser.add_argument("--tokens", default="1,8,16,40,64")
    args = parser.parse_args()
    rows = chain([int(m) for m in args.tokens.split(",")], args.model)
    write_result("kernels_chain", rows, {"gpu": torch.cuda.get_device_name()})


if __name__ == "__main__":
    main()
