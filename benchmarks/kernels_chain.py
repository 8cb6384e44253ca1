"""A whole small model on one GPU by kernels: all its linear layers with attention stubbed, and its forward pass.

    python benchmarks/kernels_chain.py [--model smollm2-135m] [--tokens 1,5,16,40,64]

Milliseconds a CUDA graph of SmolLM2-135M's shape with random bf16 weights: with tuned tiles, with the first candidates
and through cuBLAS, each with and without programmatic dependent launch. The whole forward pass sees 256 tokens of
context; five tokens a row where that divides the step.
"""

from __future__ import annotations

import argparse
import statistics
import sys
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import torch
from torch import Tensor

from benchmarks.common import Row, write_result
from server.kernels.embedding import embed
from server.kernels.norm import rms_norm
from server.kernels.paged import PagedRows
from server.models.config import parse_config
from server.models.llama import LlamaModel
from server.models.llama_kernels import LlamaKernels, Plan
from server.models.llama_kernels import Path as Way
from server.models.llama_tuning import tuned_plan
from server.models.random_weights import llama_weights
from server.models.shapes import SHAPES

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
    """Rows for every size of step, way and launch; prints a line for each."""
    config = parse_config(SHAPES[name])
    device = torch.device("cuda")
    weights = llama_weights(config, DTYPE, device)
    model = LlamaModel(config, weights.get, weights.has, MAX_POSITIONS)
    rows: list[Row] = []
    for tokens in num_tokens:
        kernels = LlamaKernels(model)
        plan = tuned_plan(kernels, choose_fastest, tokens)
        print(f"135m M={tokens} plan {plan}", flush=True)
        ways = {"tuned": plan, "default": Plan(), "cublas": Plan(Way.CUBLAS, Way.CUBLAS)}
        for label, way in ways.items():
            for pdl in (True, False):
                kernels = LlamaKernels(model, pdl=pdl)
                kernels.plans = {64: way}
                stubbed = partial(without_attention, kernels, way, tokens)
                stubbed()
                times = {"linears": graph_us(stubbed, 1000)}
                whole = whole_forward(kernels, tokens)
                whole()
                times["forward"] = graph_us(whole, 1000)
                told = "  ".join(f"{what} {statistics.median(t):.3f} ms" for what, t in times.items())
                print(f"135m M={tokens:3} {label:8} pdl {pdl!s:5}  {told}", flush=True)
                rows += [
                    Row(f"h100/chain_ms/{name}/{what}/m{tokens}/{label}{'' if pdl else '-no-pdl'}",
                        round(statistics.median(t), 4), "ms", (round(min(t), 4), round(max(t), 4)))
                    for what, t in times.items()
                ]  # fmt: skip
    return rows


def without_attention(kernels: LlamaKernels, plan: Plan, num_tokens: int) -> None:
    """All layers, a small dependent kernel in attention's place, and the head."""
    model, h = kernels.model, kernels.heads
    ids = _buffer(num_tokens)
    x = embed(ids, model.embedding)
    pool = torch.empty(num_tokens, 2 * h.num_kv_heads, h.head_dim, dtype=DTYPE, device=x.device)
    stub = torch.ones(h.num_heads * h.head_dim, dtype=DTYPE, device=x.device)
    normed: Tensor | None = None
    for layer in model.layers:
        if plan.path is Way.FUSED:
            q = kernels.fused_queries(layer, x, pool, ids, ids, plan)
        else:
            normed = rms_norm(x, layer.input_norm.weight, layer.input_norm.eps) if normed is None else normed
            q = kernels.plain_queries(layer, normed, pool, ids, ids)
        mixed = rms_norm(q.reshape(num_tokens, -1), stub, model.norm.eps)
        if plan.path is Way.FUSED:
            kernels.fused_rest(layer, x, mixed, plan)
        else:
            normed = kernels.plain_rest(layer, x, mixed, layer.input_norm)
    kernels.logits(x, normed, None, plan)


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
    parser.add_argument("--tokens", default="1,5,16,40,64")
    args = parser.parse_args()
    rows = chain([int(m) for m in args.tokens.split(",")], args.model)
    write_result("kernels_chain", rows, {"gpu": torch.cuda.get_device_name()})


if __name__ == "__main__":
    main()
