"""The engine on a GPU as it is before kernels and graphs: same tokens as on the CPU, and what synchronises in a step.

    python benchmarks/gpu_check.py [--num 16] [--max-tokens 64]

float32 (TF32 off): tokens of every drafter against plain decoding and against the CPU. Then steady verify steps under
torch's sync debug mode: every place that waits for the device is listed. Speed is printed for orientation only.
"""

from __future__ import annotations

import argparse
import sys
import traceback
import warnings
from collections import Counter
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from benchmarks import omp  # noqa: F401  before torch

# isort: split

import torch

from benchmarks.common import PROMPTS, ROOT, Row, load_prompts, write_result
from benchmarks.engine import Prompter, build, run
from server.core import Request, SamplingParams

GREEDY = SamplingParams(temperature=0.0)
SEEDED = SamplingParams(temperature=0.8, top_p=0.95, seed=99, frequency_penalty=0.2, logit_bias={198: 1.5})


def synchronising_places(drafter: str, prompts: list[list[int]]) -> Counter[str]:
    """Where a steady verify step waits, by line of our code, over all steps after the first few."""
    core = build(drafter, device="cuda", prefix_cache=False, adaptive=False)
    for i, ids in enumerate(prompts):
        core.submit(Request(str(i), ids, GREEDY if i % 2 else SEEDED, max_tokens=48, ignore_eos=True))
    for _ in range(12):
        core.step()
    places: Counter[str] = Counter()

    def note(*_: object, **__: object) -> None:
        if "called a synchronizing" not in str(_[0]):
            return  # not about waiting: torch announces the mode itself
        ours = [f for f in traceback.extract_stack() if str(ROOT) in f.filename and "gpu_check" not in f.filename]
        places[f"{Path(ours[-1].filename).relative_to(ROOT)}:{ours[-1].name}: {ours[-1].line}"] += 1

    shown, warnings.showwarning = warnings.showwarning, note
    warnings.simplefilter("always")
    torch.cuda.set_sync_debug_mode("warn")
    steps = 0
    while core.scheduler.num_decoding() == len(prompts) and steps < 8:
        core.step()
        steps += 1
    torch.cuda.set_sync_debug_mode("default")
    warnings.showwarning = shown
    places["(steps)"] = steps
    return places


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--prompts", type=Path, default=PROMPTS)
    parser.add_argument("--num", type=int, default=16)
    parser.add_argument("--max-tokens", type=int, default=64)
    args = parser.parse_args()
    prompter = Prompter()
    everything = load_prompts(args.prompts)
    prompts = [prompter.ids(p, 512) for p in everything[:: len(everything) // args.num][: args.num]]
    rows: list[Row] = []
    for kind, sampling in (("greedy", GREEDY), ("seeded", SEEDED)):
        on_cpu = run(build("none", device="cpu", prefix_cache=False), prompts, args.max_tokens, sampling).tokens
        for dtype in ("float32", "bfloat16"):
            plain: list[list[int]] | None = None
            for drafter in ("none", "ngram", "suffix"):
                core = build(drafter, device="cuda", dtype=dtype, prefix_cache=False, adaptive=False)
                run(core, prompts[:1], 8, sampling)
                got = run(core, prompts, args.max_tokens, sampling)
                plain = plain or got.tokens
                against_plain = sum(a == b for a, b in zip(plain, got.tokens, strict=True))
                against_cpu = sum(a == b for a, b in zip(on_cpu, got.tokens, strict=True))
                speed = f"{got.num_tokens / got.seconds:.0f} tok/s; {got.num_steps} steps"
                note = f"{against_cpu} equal the CPU float32; {speed}"
                rows.append(
                    Row(
                        f"h100/parity/smollm2-{dtype}/{kind}/{drafter}", against_plain, f"of {len(prompts)}", None, note
                    )
                )
                print(rows[-1], flush=True)
    detail = {d: dict(synchronising_places(d, prompts[:4])) for d in ("none", "ngram", "suffix")}
    for drafter, places in detail.items():
        print(drafter, *(f"\n  {n:5} {place}" for place, n in places.items()))
    write_result("gpu_check", rows, {"synchronising": detail, "gpu": torch.cuda.get_device_name()})


if __name__ == "__main__":
    main()
