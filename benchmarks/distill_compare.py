"""Ways of training an EAGLE-3 head, one after another on the same texts from the same start.

    python benchmarks/distill_compare.py --corpus DIR [--corpus-seeds 1,2] [--tokens N] [--init HEAD] [--steps 250]
                                         [--variants adamw,muon,…] [--profile FILE] [--name distill_compare]

Each variant makes `--steps` updates of a whole learning-rate schedule; held-out text of the target's own then says what
it is worth. Figures after so few updates rank beginnings, not ends. `--profile` writes where an update's time goes.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
import time
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from benchmarks import omp  # noqa: F401  before torch

# isort: split

import torch

from benchmarks.common import Row, write_result
from optimize.distill.board import Board
from optimize.distill.eagle3_kind import Eagle3Kind
from optimize.distill.gather import Texts, gather
from optimize.distill.options import DistillOptions
from optimize.distill.prompts import Prompts
from optimize.distill.run import Work, prepare, train
from optimize.distill.target import Served
from server.bench.machine import num_cores, short_gpu_name
from server.models.loader import pick_device
from server.models.source import resolve
from server.text.tokenizer import Tokenizer

VARIANTS: dict[str, dict[str, Any]] = {
    "adamw": {"optimizer": "adamw"},
    "muon": {"optimizer": "muon"},
    "muon-lr2": {"optimizer": "muon", "learning_rate": 2e-3},
    "muon-wide": {"optimizer": "muon", "intermediate_size": 3072},
    "muon-shared-head": {"optimizer": "muon", "train_lm_head": False, "init": None, "draft_vocab": 10**6},
    "muon-reduced-head": {"optimizer": "muon", "init": None, "draft_vocab": 13_818},
}
"""What differs from the options of the command line. The last two begin with the target's layers: its own
output layer over the whole vocabulary, and a smaller one that is trained."""
PROFILED = 6


def parse() -> argparse.Namespace:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="smollm2-135m")
    parser.add_argument("--corpus", type=Path)
    parser.add_argument("--corpus-seeds", default="0")
    parser.add_argument("--tokens", type=int, default=2_000_000)
    parser.add_argument("--init", type=Path, help="head to begin with, where a variant does not say otherwise")
    parser.add_argument("--steps", type=int, default=250)
    parser.add_argument("--batch-tokens", type=int)
    parser.add_argument("--variants", default=",".join(VARIANTS))
    parser.add_argument("--device", default="auto")
    parser.add_argument("--profile", type=Path)
    parser.add_argument("--name", default="distill_compare")
    return parser.parse_args()


def say(text: str) -> None:
    """Progress."""
    print(text, flush=True)


def work_of(options: DistillOptions, prompts: Any, texts: Texts | None) -> Work:
    """A training that is ready to begin."""
    target = Served(options, resolve(options.model))
    texts = texts or gather(target, prompts(), say, lambda: False)
    return prepare(target, Eagle3Kind(target, prompts, say), texts, options.out / "checkpoint.pt", say, Board(None))


def rows(name: str, place: str, work: Work, seconds: float) -> list[Row]:
    """What a variant has come to."""
    greedy, drawn = work.results()
    t = work.trainer
    updates = f"{t.step} updates of {t.tokens_per_update} tokens"
    case = f"{place}/distill/{{}}/{name}"
    return [
        Row(case.format("emitted_greedy"), round(greedy.emitted_per_step, 3), "tokens", note=updates),
        Row(case.format("emitted_t08"), round(drawn.emitted_per_step, 3), "tokens"),
        Row(case.format("loss"), round(t.history[-1][1], 4), "nats", note="mean of the last updates"),
        Row(case.format("tokens_per_s"), round(t.step * t.tokens_per_update / seconds), "tok/s"),
    ]


def profile(work: Work, file: Path) -> None:
    """Where an update's time goes, by kernel."""
    activities = [torch.profiler.ProfilerActivity.CPU]
    if work.trainer.device.type == "cuda":
        activities.append(torch.profiler.ProfilerActivity.CUDA)
    with torch.profiler.profile(activities=activities) as found:
        for _ in range(PROFILED):
            work.trainer.update()
    order = "self_device_time_total" if len(activities) > 1 else "self_cpu_time_total"
    file.write_text(f"{PROFILED} updates\n" + found.key_averages().table(sort_by=order, row_limit=60))


def main() -> None:
    args = parse()
    device = pick_device(args.device)
    gpu = device.type == "cuda"
    place = short_gpu_name(torch.cuda.get_device_name(device)) if gpu else f"cpu{num_cores()}"
    found: list[Row] = []
    with tempfile.TemporaryDirectory() as folder:
        base = DistillOptions(
            args.model, Path(folder), tokens=args.tokens, steps=args.steps, corpus=args.corpus, init=args.init,
            corpus_seeds=args.corpus_seeds, device=args.device, batch_tokens=args.batch_tokens,
        )  # fmt: skip
        source = resolve(args.model)
        prompts = cache(lambda: Prompts.of(Tokenizer.from_directory(source.directory)))
        texts: Texts | None = None
        for name in args.variants.split(","):
            out = Path(folder) / name
            out.mkdir()
            work = work_of(replace(base, out=out, **VARIANTS[name]), prompts, texts)
            texts = work.texts
            say(f"== {name}")
            before = time.perf_counter()
            train(work, lambda: False)
            spent = time.perf_counter() - before
            say(f"== {name}: {spent:.1f} s, updates alone {work.trainer.elapsed_s:.1f}")
            found += rows(name, place, work, work.trainer.elapsed_s)
            write_result(
                args.name,
                found,
                {"arguments": {n: v.name if isinstance(v, Path) else v for n, v in vars(args).items()}},
            )
            if args.profile is not None:
                profile(work, args.profile.with_suffix(f".{name}.txt"))
            del work
            if gpu:
                torch.cuda.empty_cache()


if __name__ == "__main__":
    main()
