"""The headline of a 7B model in 4 bits, measured: latency, throughput, size, peak memory, energy a token.

    python benchmarks/headline.py [--shape llama-2-7b] [--formats int4] [--head fp8-weights] [--budget SECONDS]

Ways: transformers' `generate` in bfloat16, our own bfloat16, and each format with speculation off and on (an EAGLE-3
head of `--head`, 4 drafts, synthetic acceptance of exactly 3 tokens a step). Weights are random, of the shape alone,
rounded as they are made (benchmarks/quantised.py). Each way is a process of its own, with one engine for a single
stream (latency, memory, energy) and one for `--rows` at once (throughput): prompts of 128 random tokens, greedy, blind
to end-of-sequence. Size is of the stored weights; peak memory the most that torch held while the single stream ran,
after loading, with a cache for that stream; energy by the GPU's own counter, idle power included, over the single
stream's runs by its tokens: of transformers that includes a second pass over the prompt, for its time to first token.

Cases: `h100/headline_7b/latency/int4` is how many times faster than our own bfloat16, throughput likewise, size how
many times smaller; memory and energy are the change in per cent. `…/vs-transformers` beside each. What a way measured
itself: `h100/headline_7b_raw/WAY/…`.
"""

from __future__ import annotations

import argparse
import gc
import json
import os
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from statistics import median
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from benchmarks import omp  # noqa: F401  before torch

# isort: split

import torch

from benchmarks.common import ROOT, Row, write_result
from benchmarks.engine import build
from benchmarks.nvml import energy_counter
from benchmarks.quantised import FORMATS, RANDOM_HEAD, Quantised, find_shape
from server.bench.engine import force_acceptance
from server.bench.machine import num_cores, short_gpu_name
from server.core import Request, SamplingParams
from server.engine.core import EngineCore
from server.engine.footprint import tensor_bytes
from server.models.loader import pick_device
from server.models.shapes import RANDOM, shape

INPUT, OUTPUT, DRAFTS, EMITTED = 128, 256, 4, 3
REPEATS = 3
SPECULATIVE = "-eagle3"
PEER, OWN = "transformers", "bf16"
GREEDY = SamplingParams(temperature=0.0)
UNITS = {"latency": "ms", "throughput": "tok/s", "size": "GB", "memory": "GB", "energy": "J/token"}
Generate = Callable[[int, int], tuple[float, float]]
"""(rows, tokens) -> seconds in all and until every row's first token."""
Measured = dict[str, float]


def ways(formats: list[str]) -> list[str]:
    """In the order in which they run."""
    return [PEER, OWN, *(name + suffix for name in formats for suffix in ("", SPECULATIVE))]


# -- one way, in its own process ---------------------------------------------------------------------------------------


def measure(args: argparse.Namespace) -> Measured:
    """What `args.way` gives: the keys of UNITS, energy where the GPU counts it."""
    device = pick_device(args.device)
    made = transformers_way if args.way == PEER else own_way
    found = alone(*made(args, device, 1), args.tokens, device)
    free(device)
    return {**found, "throughput": together(made(args, device, args.rows)[0], args.rows, args.tokens)}


def together(generate: Generate, rows: int, tokens: int) -> float:
    """Tokens a second of so many streams, prompts included."""
    generate(rows, 8)
    return rows * tokens / median(generate(rows, tokens)[0] for _ in range(REPEATS))


def alone(generate: Generate, weights: int, tokens: int, device: torch.device) -> Measured:
    """One stream: milliseconds a token after the first, GB at most and of `weights` (bytes), joules a token."""
    generate(1, tokens)
    reset_peak(device)
    energy = energy_counter() if device.type == "cuda" else None
    before = energy.joules() if energy else 0.0
    runs = [generate(1, tokens) for _ in range(REPEATS)]
    taken = energy.joules() - before if energy else 0.0
    latency = median(1e3 * (whole - first) / (tokens - 1) for whole, first in runs)
    found = {"latency": latency, "size": weights / 1e9, "memory": peak(device)}
    return {**found, "energy": taken / (REPEATS * tokens)} if energy else found


def reset_peak(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
        torch.cuda.reset_peak_memory_stats(device)


def peak(device: torch.device) -> float:
    """GB; 0 on a CPU."""
    return torch.cuda.max_memory_allocated(device) / 1e9 if device.type == "cuda" else 0.0


def free(device: torch.device) -> None:
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()


def prompts(rows: int, vocab_size: int, seed: int) -> list[list[int]]:
    generator = torch.Generator().manual_seed(seed)
    return [list(map(int, row)) for row in torch.randint(vocab_size, (rows, INPUT), generator=generator)]


def own_way(args: argparse.Namespace, device: torch.device, rows: int) -> tuple[Generate, int]:
    """Our engine of so many rows and its stored bytes, of target and head."""
    name, drafts = args.way.removesuffix(SPECULATIVE), args.way.endswith(SPECULATIVE)
    target = RANDOM + args.shape
    head = FORMATS[args.head] if drafts else None
    longest = INPUT + args.tokens + 2 * DRAFTS
    core = build(
        "eagle3" if drafts else "none",
        find=Quantised(find_shape, FORMATS[name], None, head, target),
        model=target,
        draft_model=RANDOM_HEAD if drafts else None,
        device=str(device),
        dtype=args.dtype,
        max_draft_tokens=DRAFTS,
        adaptive=False,
        prefix_cache=False,
        max_num_seqs=rows,
        max_model_len=longest + 16,
        kv_cache_tokens=rows * (longest + 64),
        max_num_batched_tokens=max(512, min(16384, rows * INPUT)),
    )
    if drafts and device.type == "cuda":
        force_acceptance(core, EMITTED)
    network = getattr(core.runner.drafter, "network", None)
    weights = tensor_bytes([core.runner.model, *([network] if network is not None else [])])
    seed = 0

    def generate(count: int, tokens: int) -> tuple[float, float]:
        nonlocal seed
        seed += 1
        return drive(core, prompts(count, core.runner.model.vocab_size, seed), tokens)

    return generate, weights


def drive(core: EngineCore, ids: list[list[int]], tokens: int) -> tuple[float, float]:
    """All at once -> seconds in all and until every row has its first token. Raises RuntimeError if one fails."""
    stamp, waiting, first = time.time_ns(), len(ids), 0.0
    requests = [
        Request(f"{stamp}-{i}", prompt, GREEDY, max_tokens=tokens, ignore_eos=True) for i, prompt in enumerate(ids)
    ]
    seen: set[str] = set()
    started = time.perf_counter()
    for output in core.generate(requests):
        if output.error:
            raise RuntimeError(output.error)
        if output.token_ids and output.request_id not in seen:
            seen.add(output.request_id)
            if len(seen) == waiting:
                first = time.perf_counter() - started
    return time.perf_counter() - started, first


def transformers_way(args: argparse.Namespace, device: torch.device, rows: int) -> tuple[Generate, int]:
    """`generate` as it comes, in bfloat16, and the bytes of its parameters."""
    from transformers import LlamaConfig, LlamaForCausalLM

    raw = shape(args.shape)
    known = {k: v for k, v in raw.items() if k not in ("architectures", "eos_token_id")}
    torch.set_default_dtype(torch.bfloat16)
    with torch.device(device):
        model = LlamaForCausalLM(LlamaConfig(**known, eos_token_id=None)).eval()
    torch.set_default_dtype(torch.float32)
    weights = sum(p.nbytes for p in model.parameters())
    seed = 0

    def timed(count: int, tokens: int) -> float:
        ids = torch.tensor(prompts(count, raw["vocab_size"], seed), device=device)
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        started = time.perf_counter()
        with torch.inference_mode():
            model.generate(
                ids, attention_mask=torch.ones_like(ids), do_sample=False, min_new_tokens=tokens, max_new_tokens=tokens,
                pad_token_id=0,
            )  # fmt: skip
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        return time.perf_counter() - started

    def generate(count: int, tokens: int) -> tuple[float, float]:
        nonlocal seed
        seed += 1
        return timed(count, tokens), timed(count, 1)

    return generate, weights


# -- all ways ----------------------------------------------------------------------------------------------------------


def child(args: argparse.Namespace, way: str, left_s: float) -> Measured | str:
    """What a way measured, or why not."""
    passed = ("shape", "head", "device", "dtype", "rows", "tokens")
    settings = [f"--{name}={getattr(args, name)}" for name in passed]
    try:
        done = subprocess.run(
            [sys.executable, __file__, f"--way={way}", *settings],
            cwd=ROOT, env=os.environ, stdout=subprocess.PIPE, text=True, timeout=max(1.0, left_s), check=True,
        )  # fmt: skip
    except subprocess.TimeoutExpired:
        return "out of time"
    except subprocess.CalledProcessError as error:
        return f"exit status {error.returncode}"
    found: Measured = json.loads(done.stdout.splitlines()[-1])
    return found


def rows_of(device: str, found: dict[str, Measured], note: str) -> list[Row]:
    """Every way against our own bfloat16 and against transformers, and the numbers themselves."""
    rows: list[Row] = []
    for way, mine in found.items():
        if way not in (PEER, OWN):
            for other, suffix in ((OWN, ""), (PEER, "/vs-transformers")):
                rows += _compared(f"{device}/headline_7b", way, suffix, mine, found.get(other), note)
        rows += [Row(f"{device}/headline_7b_raw/{way}/{k}", round(v, 4), UNITS[k], None, note) for k, v in mine.items()]
    return rows


def _compared(case: str, way: str, suffix: str, mine: Measured, other: Measured | None, note: str) -> list[Row]:
    rows = []
    for kind, value in mine.items():
        theirs = (other or {}).get(kind)
        if not theirs or not value:
            continue
        told = f"{value:.4g} and {theirs:.4g} {UNITS[kind]}; {note}"
        if kind in ("memory", "energy"):
            rows.append(Row(f"{case}/{kind}/{way}{suffix}", round(100 * (value / theirs - 1), 2), "%", None, told))
        else:
            gain = value / theirs if kind == "throughput" else theirs / value
            rows.append(Row(f"{case}/{kind}/{way}{suffix}", round(gain, 3), "x", None, told))
    return rows


def options() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", default="llama-2-7b", help="a named shape or a directory with a config.json")
    parser.add_argument("--formats", default="int4", help=f"comma-separated: {', '.join(FORMATS)}")
    parser.add_argument("--head", default="fp8-weights", choices=FORMATS, help="format of the EAGLE-3 head")
    parser.add_argument("--device", default="auto")
    parser.add_argument("--dtype", default="auto")
    parser.add_argument("--rows", type=int, default=64, help="streams at once, for throughput")
    parser.add_argument("--tokens", type=int, default=OUTPUT, help="of each answer")
    parser.add_argument("--budget", type=float, default=400.0, help="seconds for everything")
    parser.add_argument("--way", help=argparse.SUPPRESS)
    return parser


def main() -> int:
    args = options().parse_args()
    if args.way:
        print(json.dumps(measure(args)))
        return 0
    end = time.monotonic() + args.budget
    found: dict[str, Measured] = {}
    failed: dict[str, str] = {}
    device = device_name_of(args.device)
    note = f"{INPUT} in, {args.tokens} out; throughput of {args.rows}; speculation emits {EMITTED} a step, synthetic"
    for way in ways([name.strip() for name in args.formats.split(",")]):
        started = time.monotonic()
        result = child(args, way, end - time.monotonic())
        if isinstance(result, str):
            failed[way] = result
        else:
            found[way] = result
        print(f"{way}: {result}, {time.monotonic() - started:.0f} s", flush=True)
        detail: dict[str, Any] = {"failed": failed}
        write_result(f"{device}_headline", rows_of(device, found, note), detail, show=False)
    return 1 if failed else 0


def device_name_of(name: str) -> str:
    """As cases begin."""
    device = pick_device(name)
    return f"cpu{num_cores()}" if device.type == "cpu" else short_gpu_name(torch.cuda.get_device_name(device))


if __name__ == "__main__":
    sys.exit(main())
