"""The embedded model's GGUF file, side by side with llama.cpp on the same threads, alternating in one run.

    python benchmarks/vs_llamacpp.py [--llama-python PYTHON] [--per-category 1] [--max-tokens 128] [--repeats 3]

`--llama-python`: an interpreter that has `llama-cpp-python` 0.3.36, which is needed for this comparison only. Per
prompt: llama.cpp one stream, this engine plain, this engine with speculation, order alternating. Speeds of decoding are
tokens after the first over their seconds, greedy. Sixteen streams: all tokens over all seconds, prompts included, over
llama.cpp's speed of one stream. Prefill: a prompt of 512 tokens until its first token.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from benchmarks import omp  # noqa: F401  before torch

# isort: split

import torch

from benchmarks.common import PROMPTS, Row, load_prompts, median_row, write_result
from benchmarks.engine import Prompter, build, run
from server.core import SamplingParams, SpeculationParams
from server.engine.core import EngineCore
from server.models.embedded import embedded_gguf

GREEDY = SamplingParams(temperature=0.0)
OFF, ON = SpeculationParams(enabled=False), SpeculationParams()
PREFILL = 512
STREAMS = 16


@dataclass
class LlamaCpp:
    """The other side: a child process that sleeps until it is asked."""

    process: subprocess.Popen[str]
    version: str

    @classmethod
    def start(cls, python: str, threads: int) -> LlamaCpp:
        """Raises RuntimeError if the child does not start."""
        script = Path(__file__).with_name("llamacpp_child.py")
        command = [python, str(script), str(embedded_gguf()), str(threads)]
        process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
        assert process.stdout is not None
        line = process.stdout.readline()
        if not line:
            raise RuntimeError(f"{python}: llama-cpp-python does not start; name an interpreter with --llama-python")
        return cls(process, json.loads(line)["version"])

    def run(self, prompt: list[int], new: int) -> dict[str, Any]:
        """`llamacpp_child`'s answer."""
        assert self.process.stdin is not None and self.process.stdout is not None
        self.process.stdin.write(json.dumps({"prompt": prompt, "new": new}) + "\n")
        self.process.stdin.flush()
        answer: dict[str, Any] = json.loads(self.process.stdout.readline())
        return answer

    def decode_tok_s(self, prompt: list[int], new: int) -> float:
        """Of the tokens after the first."""
        return (new - 1) / float(self.run(prompt, new)["decode_s"])


def one_stream(
    llama: LlamaCpp, core: EngineCore, prompts: list[tuple[str, list[int]]], max_tokens: int, repeats: int
) -> tuple[list[Row], list[dict[str, Any]]]:
    """Rows plain and spec: seconds of all prompts of a category, then the mean over categories of the ratios."""
    detail: list[dict[str, Any]] = []
    for repeat in range(repeats):
        for i, (category, ids) in enumerate(prompts):
            seen: dict[str, Any] = {"category": category, "repeat": repeat}
            for side in ("llama", "plain", "spec") if (i + repeat) % 2 else ("spec", "plain", "llama"):
                if side == "llama":
                    seen[side] = llama.decode_tok_s(ids, max_tokens)
                else:
                    done = run(core, [ids], max_tokens, GREEDY, speculation=ON if side == "spec" else OFF)
                    seen[side], seen[f"{side}_steps"] = done.decode_tok_s, done.num_steps
                    seen[f"{side}_tokens"] = done.num_tokens
            detail.append(seen)
            print(seen, flush=True)
    rows = []
    for side in ("plain", "spec"):
        ratios = [_ratio([d for d in detail if d["repeat"] == r], side) for r in range(repeats)]
        note = f"of llama.cpp's {statistics.median(d['llama'] for d in detail):.0f} tok/s; "
        note += f"{statistics.median(d[side] for d in detail):.0f} tok/s"
        rows.append(median_row(f"cpu2/vs_llamacpp/{side}", ratios, "x", note))
    return rows, detail


def _ratio(detail: list[dict[str, Any]], side: str) -> float:
    by_category: dict[str, list[float]] = {}
    for seen in detail:
        if seen[f"{side}_tokens"] > 16:  # an answer of a few tokens has nothing to time
            by_category.setdefault(seen["category"], []).append(seen[side] / seen["llama"])
    return statistics.mean(statistics.median(values) for values in by_category.values())


def sixteen_streams(llama: LlamaCpp, core: EngineCore, prompts: list[list[int]], max_tokens: int, repeats: int) -> Row:
    """All tokens over all seconds of sixteen requests at once, over one stream of llama.cpp."""
    ratios, speeds = [], []
    for i in range(repeats):
        alone = llama.decode_tok_s(prompts[i % len(prompts)], max_tokens)
        together = run(core, prompts, max_tokens, GREEDY, speculation=OFF)
        speeds.append(together.num_tokens / together.seconds)
        ratios.append(speeds[-1] / alone)
    return median_row("cpu2/vs_llamacpp/b16", ratios, "x", f"{statistics.median(speeds):.0f} tok/s, prompts included")


def prefill(llama: LlamaCpp, core: EngineCore, ids: list[int], repeats: int) -> Row:
    """Seconds until the first token of a long prompt, theirs over ours."""
    ratios, speeds = [], []
    for _ in range(repeats):
        theirs = float(llama.run(ids, 1)["prompt_s"])
        ours = run(core, [ids], 1, GREEDY, speculation=OFF).first_token_s
        speeds.append(len(ids) / ours)
        ratios.append(theirs / ours)
    return median_row("cpu2/vs_llamacpp/prefill", ratios, "x", f"{statistics.median(speeds):.0f} tok/s")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--llama-python", default=sys.executable)
    parser.add_argument("--prompts", type=Path, default=PROMPTS)
    parser.add_argument("--per-category", type=int, default=1)
    parser.add_argument("--max-tokens", type=int, default=128)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--drafter", default="auto")
    args = parser.parse_args()
    torch.set_grad_enabled(False)
    prompter = Prompter()
    core = build(args.drafter, device="cpu", prefix_cache=False, num_threads=args.threads)
    llama = LlamaCpp.start(args.llama_python, args.threads)
    chosen = [(p.category, prompter.ids(p)) for p in load_prompts(args.prompts, args.per_category)]
    every = [prompter.ids(p) for p in load_prompts(args.prompts)]
    short = [ids for ids in every if len(ids) < 300]
    text = [token for ids in short for token in ids]
    run(core, [short[0]], 8, GREEDY)
    llama.run(short[0], 8)
    rows, detail = one_stream(llama, core, chosen, args.max_tokens, args.repeats)
    rows.append(sixteen_streams(llama, core, short[:: len(short) // STREAMS][:STREAMS], 64, args.repeats))
    rows.append(prefill(llama, core, text[:PREFILL], args.repeats + 2))
    llama.process.terminate()
    about = {"llama_cpp_python": llama.version, "linear_path": core.runner.linear_path, "prompts": detail}
    print("written", write_result("vs_llamacpp", rows, about))


if __name__ == "__main__":
    main()
