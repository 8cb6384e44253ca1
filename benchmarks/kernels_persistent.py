"""The persistent kernel on a GPU: is it right, how long does a step take, and where does the time go.

    python benchmarks/kernels_persistent.py [--seconds 50] [--json FILE]

SmolLM2-135M's shape with random bf16 weights. Errors are relative (norm of logits) to the same network in float32
beside those of the model's own bf16 forward. Times: a CUDA graph with one launch, medians of 5 runs of 50 replays.
A phase's time is of a launch that runs it for all layers without barriers (weights not prefetched, so they are
waited for); the barriers' is that of a launch that does nothing else. Knobs are swept until the seconds are over: each
setting compiles.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import statistics
import sys
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import torch
from torch import Tensor

from benchmarks.persistent.kernel import ALL, BARRIERS
from benchmarks.persistent.model import Knobs, PersistentLlama
from server.kernels.paged import PagedRows
from server.models.attention import AttentionBatch
from server.models.config import parse_config
from server.models.llama import LlamaModel

SMOLLM2 = {
    "architectures": ["LlamaForCausalLM"],
    "vocab_size": 49152,
    "hidden_size": 576,
    "num_hidden_layers": 30,
    "num_attention_heads": 9,
    "num_key_value_heads": 3,
    "intermediate_size": 1536,
    "max_position_embeddings": 8192,
    "rms_norm_eps": 1e-5,
    "rope_theta": 100000.0,
    "tie_word_embeddings": True,
}
QUICK = Knobs(patience=1 << 16)
"""Gives up after some 40 ms: a barrier that hangs must not burn the machine's time."""
BLOCK = 16
CONTEXT = 256
STEPS = [(1, 1), (1, 5), (8, 1), (16, 1), (2, 8)]
"""(rows, query tokens a row)."""
SWEEP: dict[str, dict[str, Any]] = {
    "default": {},
    "no prefetch": {"prefetch": False},
    "split 128": {"split": 128},
    "warp keys 32": {"warp_keys": 32},
    "not cooperative": {"cooperative": False},
    "head rows 16": {"head_rows": 16},
    "gate rows 8": {"gate_rows": 8},
    "out, down rows 16": {"out_rows": 16, "down_rows": 16},
    "4 warps": {"num_warps": 4, "warp_keys": 32},
    "16 warps": {"num_warps": 16, "head_rows": 16},
}
PHASES = ["A qkv", "B attention", "C output", "D gate, up", "E down", "F head", "barriers"]


def random_model(dtype: torch.dtype, device: torch.device) -> LlamaModel:
    """Weights of deviation 1 / sqrt(fan in), the same for every dtype."""
    config = parse_config(SMOLLM2)
    generator = torch.Generator(device).manual_seed(0)

    def get(name: str) -> Tensor:
        h, d = config.hidden_size, config.head_dim
        out, fan = {
            "q_proj": (config.num_heads * d, h),
            "k_proj": (config.num_kv_heads * d, h),
            "v_proj": (config.num_kv_heads * d, h),
            "o_proj": (h, config.num_heads * d),
            "gate_proj": (config.intermediate_size, h),
            "up_proj": (config.intermediate_size, h),
            "down_proj": (h, config.intermediate_size),
            "embed_tokens": (config.vocab_size, h),
        }.get(name.split(".")[-2], (0, h))
        if not out:
            return (torch.rand(h, device=device, generator=generator) + 0.5).bfloat16().to(dtype)
        scale = 1.0 if "embed" in name else fan**-0.5
        weight = torch.randn(out, fan, device=device, generator=generator) * scale
        return weight.bfloat16().to(dtype)

    return LlamaModel(config, get, lambda _: False, 8192)


class Step:
    """Inputs of a step of R rows of `width` tokens behind `context` tokens each."""

    def __init__(self, model: LlamaModel, rows: int, width: int, context: int = CONTEXT) -> None:
        c, device = model.config, model.device
        blocks = -(-(context + width) // BLOCK)
        tables = (torch.randperm(rows * blocks) + 1).int().view(rows, blocks)
        starts = torch.full((rows,), context)
        at = starts[:, None] + torch.arange(width)
        place = tables.long().gather(1, at // BLOCK) * BLOCK + at % BLOCK
        everything = torch.arange(context + width).expand(rows, -1)
        gather = tables.long().gather(1, everything // BLOCK) * BLOCK + everything % BLOCK
        shape = (c.num_layers, (rows * blocks + 1) * BLOCK, 2 * c.num_kv_heads, c.head_dim)
        self.pools = torch.randn(shape).bfloat16().to(device)
        self.token_ids = torch.randint(0, c.vocab_size, (rows * width,)).to(device)
        self.positions, self.mapping = at.flatten().to(device), place.flatten().to(device)
        slots = torch.arange(rows)
        self.rows = PagedRows(
            slots.to(device), starts.to(device), tables.to(device), BLOCK, max_context=context + width, width=width
        )
        self.batch = AttentionBatch(self.mapping, self.positions, gather=gather.to(device), width=width)

    def plain(self, model: LlamaModel) -> Tensor:
        """Logits of the model's own forward, in its dtype."""
        everything = torch.arange(len(self.token_ids), device=model.device)
        return model.forward(self.token_ids, list(self.pools.to(model.dtype)), self.batch, everything)[0]

    def fast(self, llama: PersistentLlama) -> Tensor:
        """Logits of the persistent kernel; keys and values are written over the same ones."""
        return llama.forward(self.token_ids, self.pools, self.rows, self.positions, self.mapping)


def milliseconds(run: Callable[[], object], replays: int = 50) -> tuple[float, float, float]:
    """(median, lowest, highest) of 5 runs, a graph of one call."""
    run()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        run()
    times = []
    for _ in range(6):
        begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        begin.record()
        for _ in range(replays):
            graph.replay()
        end.record()
        torch.cuda.synchronize()
        times.append(begin.elapsed_time(end) / replays)
    return statistics.median(times[1:]), min(times[1:]), max(times[1:])


def check(model: LlamaModel, llama: PersistentLlama, wide: LlamaModel) -> list[dict[str, object]]:
    """Relative errors against float32; the second replay of a graph must give the first one's bits."""
    found: list[dict[str, object]] = []
    for rows, width in STEPS:
        step = Step(model, rows, width)
        truth = step.plain(wide)
        ours, again, theirs = step.fast(llama), step.fast(llama), step.plain(model)
        errors = [float((x - truth).norm() / truth.norm()) for x in (ours, theirs)]
        same = float((ours.argmax(-1) == truth.argmax(-1)).float().mean())
        if llama.gave_up():
            raise SystemExit("the barrier gave up: programs did not all run at once, or one of them is wrong")
        ok = errors[0] < 1.5 * errors[1] + 1e-3 and torch.equal(ours, again)
        found.append(
            {"rows": rows, "width": width, "error": errors[0], "torch_error": errors[1], "argmax": same, "ok": ok}
        )
        print(found[-1], flush=True)
    return found


def by_phase(llama: PersistentLlama, step: Step) -> dict[str, float]:
    """Microseconds of each phase over all layers."""
    layers = len(llama.model.layers)
    logits = torch.empty(len(step.token_ids), llama.model.vocab_size, device=llama.device)

    def launch(phase: int) -> Callable[[], object]:
        arguments = (step.token_ids, step.pools, step.rows, step.positions, step.mapping, logits)
        return lambda: llama.launch(*arguments, phase, 0, layers)

    found = {name: milliseconds(launch(phase))[0] * 1e3 for phase, name in enumerate(PHASES)}
    found["all"] = milliseconds(launch(ALL))[0] * 1e3
    assert PHASES.index("barriers") == BARRIERS
    return {name: round(value, 1) for name, value in found.items()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seconds", type=float, default=50.0)
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    started = time.monotonic()
    torch.manual_seed(0)
    torch.backends.cuda.matmul.allow_tf32 = False
    device = torch.device("cuda")
    model = random_model(torch.bfloat16, device)
    llama = PersistentLlama(model, knobs=QUICK)
    print(f"stacked weights: {llama.weights.num_bytes / 1e6:.0f} MB; {llama.num_programs} programs", flush=True)
    checked = check(model, llama, random_model(torch.float32, device))
    result: dict[str, object] = {"device": torch.cuda.get_device_name(), "check": checked}
    print(f"[{time.monotonic() - started:.1f} s] µs by phase, all layers", flush=True)
    steps = {(rows, width): Step(model, rows, width) for rows, width in STEPS}
    result["phases_us"] = {f"{key}": by_phase(llama, steps[key]) for key in ((1, 1), (16, 1))}
    print(json.dumps(result["phases_us"], indent=1), flush=True)
    sweep: dict[str, dict[str, object]] = {}
    result["sweep_ms"] = sweep
    for name, changes in SWEEP.items():
        if time.monotonic() - started > args.seconds:
            print(f"no time for: {name}", flush=True)
            continue
        tuned = PersistentLlama(model, knobs=dataclasses.replace(QUICK, **changes)) if changes else llama
        steps[1, 1].fast(tuned)
        if tuned.gave_up():
            print(f"{name}: the barrier gave up", flush=True)
            continue
        sweep[name] = {
            f"{rows}x{width}": [round(t, 4) for t in milliseconds(partial(step.fast, tuned))]
            for (rows, width), step in steps.items()
        }
        sweep[name]["gave up"] = tuned.gave_up()
        print(f"[{time.monotonic() - started:.1f} s] {name}: {sweep[name]}", flush=True)
    if args.json:
        args.json.write_text(json.dumps(result, indent=1))


if __name__ == "__main__":
    main()
