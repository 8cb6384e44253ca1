"""Emitted tokens per verify step of every drafter on the evaluation prompts, real text, on a CPU or a GPU.

    python benchmarks/emitted.py [--prompts FILE] [--drafters eagle3,suffix,…] [--draft-model DIR] [--small-lm DIR]
        [--modes greedy,t08] [--rules coupled,ratio] [--k 5] [--limit N] [--budget SECONDS]
    python benchmarks/emitted.py --speed [--widened] …      tokens a second of one stream: benchmarks/text/speed.py

Both turns of each prompt through the chat template, at most 256 new tokens a turn, end-of-sequence honoured, always `k`
drafts (no policy). A row of a batch that is verified is one verify step; the first token of an answer is its prompt's
and counts as neither. Tokens by steps of each category, then the mean over categories; and again without answers that
fall into a loop (`benchmarks/text/conversations.py` says what one is). The second turn follows the answer that the
first drafter to run gave to the first turn, so that all drafters see the same prompts. Mode t08 samples at temperature
0.8, seeded by prompt and turn; rule `ratio` differs from `coupled` there only. The suffix drafter copies from its own
request alone (`recent_outputs` 0): with others' outputs the figure would depend on the order of the prompts.

What the budget did not suffice for is said, in the notes and at the end; then the exit status is 1. Prompts run in an
order that takes each category in turn, so that what a cut run has measured is still a fair sample.
"""

from __future__ import annotations

import argparse
import gc
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from benchmarks import omp  # noqa: F401  before torch

# isort: split

import torch

from benchmarks.common import PROMPTS, Row, write_result
from benchmarks.engine import CANNOT_BUILD, Prompter, build, device_name
from benchmarks.text.acceptance import table
from benchmarks.text.conversations import interleaved, load_conversations
from benchmarks.text.draft_length import DraftLengths
from benchmarks.text.speed import measure
from benchmarks.text.talk import Talker, rows_of
from server.config import DRAFTERS
from server.engine.core import EngineCore
from server.models.loader import pick_device

MODES = ("greedy", "t08")
WITH_HEAD = ("eagle3", "hybrid")
"""Drafters that take `--draft-model`."""
GPU_STREAMS, CPU_STREAMS = 64, 8
GPU_BATCHED_TOKENS = 8192
MAX_TOKENS = 256


@dataclass(frozen=True)
class Job:
    """One engine: a drafter under a rule, and the modes it runs."""

    drafter: str
    rule: str
    modes: tuple[str, ...]

    def case(self, device: str, label: str, mode: str) -> str:
        suffix = "" if self.rule == "coupled" else f"-{self.rule}"
        return f"{device}/emitted_per_step/{label}-{self.drafter}/{mode}{suffix}"


def jobs(drafters: list[str], modes: list[str], rules: list[str]) -> Iterator[Job]:
    """Rule by rule; greedy decoding is the same under both."""
    for rule in rules:
        wanted = tuple(mode for mode in modes if rule == "coupled" or mode != "greedy" or "coupled" not in rules)
        yield from (Job(drafter, rule, wanted) for drafter in drafters if wanted)


class Emitted:
    """All jobs of a run; results are written after each of them."""

    def __init__(self, args: argparse.Namespace) -> None:
        self.args = args
        self.deadline = time.monotonic() + args.budget
        self.on_gpu = pick_device(args.device).type == "cuda"
        self.streams: int = args.streams or (GPU_STREAMS if self.on_gpu else CPU_STREAMS)
        self.conversations = interleaved(load_conversations(args.prompts, args.limit))
        self.talker = Talker(Prompter(args.model), args.max_tokens or MAX_TOKENS, args.max_prompt)
        self.rows: list[Row] = []
        self.tables: dict[str, Any] = {}
        self.left_out: list[str] = []

    def run(self, job: Job) -> None:
        if time.monotonic() > self.deadline:
            self.left_out += [f"{job.drafter} {job.rule} {mode}: out of time" for mode in job.modes]
            return
        started = time.monotonic()
        try:
            core = self._build(job)
        except CANNOT_BUILD as error:
            self.left_out.append(f"{job.drafter} {job.rule}: {error}")
            return
        if core.runner.drafter is not None:
            DraftLengths(core).fixed(self.args.k)
        print(f"== {job.drafter} {job.rule}: ready after {time.monotonic() - started:.1f} s", flush=True)
        for mode in job.modes:
            self._mode(core, job, mode)
        name = self.args.name or f"{device_name(core)}_emitted"
        write_result(name, self.rows, {"left_out": self.left_out, "tables": self.tables}, show=False)
        del core
        gc.collect()
        if self.on_gpu:
            torch.cuda.empty_cache()

    def _mode(self, core: EngineCore, job: Job, mode: str) -> None:
        started = time.monotonic()
        talk = self.talker.talk(core, self.conversations, mode, self.streams, self.deadline)
        took = time.monotonic() - started
        case = job.case(device_name(core), self.args.label, mode)
        rows = rows_of(case, talk, f"k = {self.args.k}, rule {job.rule}")
        self.rows += rows
        self.tables[case] = {
            kind: {category: t.as_json() for category, t in talk.totals(with_loops=kind == "all").items()}
            for kind in ("all", "no-loops")
        }
        print(f"-- {case}: {took:.1f} s, {talk.num_loops} of {len(talk.answers)} answers loop")
        print(table(talk.totals()))
        print("\n".join(f"{row.case} {row.value:.3f} ({row.note})" for row in rows[:2]), flush=True)
        if len(talk.answers) < talk.wanted:
            self.left_out.append(f"{case}: {talk.wanted - len(talk.answers)} of {talk.wanted} answers")

    def _build(self, job: Job) -> EngineCore:
        args = self.args
        longest = args.max_prompt + self.talker.max_tokens
        return build(
            job.drafter,
            model=args.model,
            draft_model=draft_model_of(args, job.drafter),
            device=args.device,
            dtype=args.dtype,
            verification=job.rule,
            max_draft_tokens=args.k,
            adaptive=False,
            max_num_seqs=self.streams,
            prefix_cache=False,
            recent_outputs=0,
            kv_cache_tokens=self.streams * (longest + 64),
            max_model_len=longest + 16,
            max_num_batched_tokens=GPU_BATCHED_TOKENS if self.on_gpu else None,
        )


def drafters_of(args: argparse.Namespace) -> list[str]:
    """Those that were asked for; else all that the engine offers, small-lm if there is a model for it."""
    if args.drafters:
        return [name.strip() for name in args.drafters.split(",")]
    small = ["small-lm"] if args.small_lm else []
    return [name for name in (*WITH_HEAD, "suffix", "ngram", *small) if name in DRAFTERS]


def draft_model_of(args: argparse.Namespace, drafter: str) -> str | None:
    given = {"small-lm": args.small_lm, **dict.fromkeys(WITH_HEAD, args.draft_model)}
    return given.get(drafter)


def options() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="smollm2-135m")
    parser.add_argument("--label", default="smollm2", help="the model in case names")
    parser.add_argument("--prompts", type=Path, default=PROMPTS)
    parser.add_argument("--device", default="auto")
    parser.add_argument("--dtype", default="auto")
    parser.add_argument("--drafters", help="comma-separated; default: all for which a model is given")
    parser.add_argument("--draft-model", help="the EAGLE-3 head's directory, for eagle3 and hybrid")
    parser.add_argument("--small-lm", help="the small model's directory, for small-lm")
    parser.add_argument("--k", type=int, default=5)
    parser.add_argument("--modes", default=",".join(MODES))
    parser.add_argument("--rules", default="coupled,ratio")
    parser.add_argument("--limit", type=int, help="prompts of each category (default: all, 1 with --speed)")
    parser.add_argument("--max-tokens", type=int, help=f"of an answer (default: {MAX_TOKENS}, 128 with --speed)")
    parser.add_argument("--max-prompt", type=int, default=2560)
    parser.add_argument("--streams", type=int, help="answers under way at once")
    parser.add_argument("--budget", type=float, default=1e9, help="seconds after which no answer is begun")
    parser.add_argument("--name", help="of the result file")
    parser.add_argument("--speed", action="store_true", help="measure tokens a second of one stream instead")
    parser.add_argument("--passes", type=int, default=3, help="speed: over the prompts")
    parser.add_argument(
        "--fixed", help="speed: draft lengths to measure, comma-separated (default: the engine's tiers)"
    )
    parser.add_argument("--widened", action="store_true", help="speed: model and head in the shape of --shape")
    parser.add_argument("--shape", default="llama-3.1-8b", help="a named shape or a directory with a config.json")
    parser.add_argument("--quantise", default="bf16", help="speed: format of the model's layers (quantised.py)")
    parser.add_argument("--quantise-head", default="bf16", help="speed: format of the EAGLE-3 head's layers")
    return parser


def main() -> None:
    args = options().parse_args()
    if args.speed:
        left_out = measure(args, [(name, draft_model_of(args, name)) for name in drafters_of(args)])
    else:
        run = Emitted(args)
        for job in jobs(drafters_of(args), args.modes.split(","), args.rules.split(",")):
            run.run(job)
        left_out = run.left_out
    print("\n".join(f"not run: {what}" for what in left_out) or "all was run", flush=True)
    sys.exit(1 if left_out else 0)


if __name__ == "__main__":
    main()
