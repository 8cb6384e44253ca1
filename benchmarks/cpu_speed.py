"""Speed on a CPU in float32, alternating in one process: transformers' `generate`, plain decoding, suffix speculation.

    python benchmarks/cpu_speed.py [--per-category 4] [--max-tokens 128] [--repeats 5]

Prefix caching is off, so nothing is measured twice for free. One stream: tokens a second after the first token, the
same prompts on each side, order alternating. Sixteen streams: all tokens over all seconds, prompts included, against
`generate` one by one on the same sixteen prompts.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import time
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from benchmarks import omp  # noqa: F401  before torch

# isort: split

import torch

from benchmarks.common import PROMPTS, Row, load_prompts, median_row, write_result
from benchmarks.engine import Prompter, Run, build, run
from server.core import SamplingParams, SpeculationParams
from server.engine.core import EngineCore

GREEDY = SamplingParams(temperature=0.0)
OFF, ON = SpeculationParams(enabled=False), SpeculationParams()


class Reference:
    """transformers' own greedy generation, default settings, float32."""

    def __init__(self, prompter: Prompter) -> None:
        from transformers import AutoModelForCausalLM

        self.model = AutoModelForCausalLM.from_pretrained(prompter.directory, dtype=torch.float32).eval()

    def run(self, ids: list[int], max_tokens: int) -> Run:
        stamps: list[float] = []

        def stamp(*_: Any) -> None:
            stamps.append(time.perf_counter())

        handle = self.model.register_forward_hook(stamp)
        started = time.perf_counter()
        out = self.model.generate(
            torch.tensor([ids]),
            max_new_tokens=max_tokens,
            do_sample=False,
            attention_mask=torch.ones(1, len(ids), dtype=torch.int64),
            pad_token_id=2,
        )
        seconds = time.perf_counter() - started
        handle.remove()
        return Run([out[0, len(ids) :].tolist()], seconds, stamps[0] - started, len(stamps), 0, 0)


def one_stream(
    reference: Reference, core: EngineCore, prompts: list[list[int]], max_tokens: int, repeats: int
) -> list[Row]:
    theirs, ours, ratios = [], [], []
    same = 0
    for i in range(repeats):
        ids = prompts[i % len(prompts)]
        if i % 2:
            b = run(core, [ids], max_tokens, GREEDY, speculation=OFF)
            a = reference.run(ids, max_tokens)
        else:
            a = reference.run(ids, max_tokens)
            b = run(core, [ids], max_tokens, GREEDY, speculation=OFF)
        theirs.append(a.decode_tok_s)
        ours.append(b.decode_tok_s)
        ratios.append(b.decode_tok_s / a.decode_tok_s)
        same += a.tokens == b.tokens
    return [
        median_row("cpu2/tok_s/smollm2-f32/b1/transformers", theirs, "tok/s"),
        median_row("cpu2/tok_s/smollm2-f32/b1/plain", ours, "tok/s", f"same tokens in {same} of {repeats}"),
        median_row("cpu2/ratio/smollm2-f32/b1/plain_vs_transformers", ratios, "x", "target 1.3"),
    ]


def sixteen_streams(
    reference: Reference, core: EngineCore, prompts: list[list[int]], max_tokens: int, repeats: int
) -> list[Row]:
    theirs, ours, ratios = [], [], []
    for _ in range(repeats):
        sequential = [reference.run(ids, max_tokens) for ids in prompts]
        a = sum(r.num_tokens for r in sequential) / sum(r.seconds for r in sequential)
        together = run(core, prompts, max_tokens, GREEDY, speculation=OFF)
        b = together.num_tokens / together.seconds
        theirs.append(a)
        ours.append(b)
        ratios.append(b / a)
    return [
        median_row("cpu2/tok_s/smollm2-f32/sequential/transformers", theirs, "tok/s", "the same 16 prompts"),
        median_row("cpu2/tok_s/smollm2-f32/b16/plain", ours, "tok/s", "prompts included"),
        median_row("cpu2/ratio/smollm2-f32/b16/plain_vs_transformers", ratios, "x", "target 6"),
    ]


def by_category(
    core: EngineCore, prompter: Prompter, args: argparse.Namespace
) -> tuple[list[Row], list[dict[str, Any]]]:
    """Decoding speed with speculation over plain, per category: total tokens over total decode seconds of either."""
    prompts = load_prompts(args.prompts, args.per_category)
    totals: dict[str, list[tuple[Run, Run]]] = {}
    detail: list[dict[str, Any]] = []
    for i, prompt in enumerate(prompts):
        ids = prompter.ids(prompt)
        order = [OFF, ON] if i % 2 == 0 else [ON, OFF]
        runs = {way: run(core, [ids], args.max_tokens, GREEDY, speculation=way) for way in order}
        a, b = runs[OFF], runs[ON]
        totals.setdefault(prompt.category, []).append((a, b))
        detail.append(
            {
                "id": prompt.id,
                "category": prompt.category,
                "prompt_tokens": len(ids),
                "tokens": b.num_tokens,
                "plain_s": round(a.seconds - a.first_token_s, 4),
                "spec_s": round(b.seconds - b.first_token_s, 4),
                "steps": b.num_steps,
                "drafted": b.num_drafted,
                "accepted": b.num_accepted,
                "same_tokens": a.tokens == b.tokens,
            }
        )
        print(detail[-1], flush=True)
    rows = []
    for category, pairs in totals.items():
        decode = [
            (sum(r.seconds - r.first_token_s for r in side), sum(r.num_tokens - 1 for r in side))
            for side in zip(*pairs, strict=True)
        ]
        ratio = (decode[1][1] / decode[1][0]) / (decode[0][1] / decode[0][0])
        each = [(b.decode_tok_s / a.decode_tok_s) for a, b in pairs if a.num_tokens > 1]
        target = 1.3 if category in ("summarization", "rag") else 0.97
        emitted = (
            sum(b.num_accepted for _, b in pairs) / max(1, sum(b.num_tokens - b.num_accepted - 1 for _, b in pairs)) + 1
        )
        rows.append(
            Row(
                f"cpu2/speedup/smollm2-f32-suffix/b1/{category}",
                round(ratio, 3),
                "x",
                (round(min(each), 3), round(max(each), 3)),
                f"target {target}; {emitted:.2f} emitted a step; plain {decode[0][1] / decode[0][0]:.1f} tok/s",
            )
        )
    macro = statistics.mean(r.value for r in rows)
    rows.append(Row("cpu2/speedup/smollm2-f32-suffix/b1/macro", round(macro, 3), "x", None, "mean over categories"))
    return rows, detail


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--prompts", type=Path, default=PROMPTS)
    parser.add_argument("--per-category", type=int, default=4)
    parser.add_argument("--max-tokens", type=int, default=128)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--name", default="cpu_speed")
    args = parser.parse_args()
    torch.set_grad_enabled(False)
    prompter = Prompter()
    # One engine, one copy of the weights in memory: where a copy lies is worth ten per cent of a step. Plain decoding
    # is the same engine with speculation switched off by the request, as any client can.
    core = build("suffix", device="cpu", weights="dequantised", prefix_cache=False)
    reference = Reference(prompter)
    short = [p for p in (prompter.ids(p) for p in load_prompts(args.prompts)) if len(p) < 300]
    sixteen = short[:: len(short) // 16][:16]
    run(core, [sixteen[0]], 8, GREEDY)
    reference.run(sixteen[0], 8)
    rows = one_stream(reference, core, sixteen, args.max_tokens, args.repeats)
    rows += sixteen_streams(reference, core, sixteen, 64, max(1, args.repeats // 2 + 1))
    more, detail = by_category(core, prompter, args)
    print("written", write_result(args.name, rows + more, {"prompts": detail}))


if __name__ == "__main__":
    main()
