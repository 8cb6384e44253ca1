"""What a speculative step costs in plain steps: the tokens that it has to emit to be worth it.

    python benchmarks/break_even.py [--model random:llama-3.1-8b] [--draft-model DIR] [--k 4] [--batch 1,64]

Plain and speculative steps of one engine take turns (drafting switched off and on, nothing loaded anew): random prompts
of 128 tokens, 256 tokens out, greedy. A step's time is the mean gap between outputs of steps in which all rows decoded;
the ratio is of the two runs of one turn, medians and ranges are of turns. What the drafts are worth does not matter
here: a step costs the same whether they are accepted or not, so random weights do.
"""

from __future__ import annotations

import argparse
import gc
import random
import statistics
import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from benchmarks import omp  # noqa: F401  before torch

# isort: split

from benchmarks.common import Row, median_row, write_result
from benchmarks.engine import build, device_name
from benchmarks.text.draft_length import DraftLengths
from server.bench.engine import find
from server.core import Request, SamplingParams
from server.engine.collector import frozen_start
from server.engine.core import EngineCore

GREEDY = SamplingParams(temperature=0.0)


def break_even(plain_ms: float, spec_ms: float) -> float:
    """Tokens a row that a speculative step must emit on average to be as fast as plain steps, which emit one each."""
    return spec_ms / plain_ms


def step_ms(core: EngineCore, num_rows: int, num_in: int, num_out: int, seed: int) -> float:
    """Milliseconds of a step in which all of `num_rows` rows decode, under the engine's current draft length."""
    draw = random.Random(seed)
    size = core.runner.model.vocab_size
    stamp = time.time_ns()
    for i in range(num_rows):
        ids = draw.choices(range(size), k=num_in)
        refused = core.submit(Request(f"{stamp}-{i}", ids, GREEDY, max_tokens=num_out, ignore_eos=True))
        if refused is not None:
            raise RuntimeError(refused.error)
    gc.collect()
    gaps: list[float] = []
    last: float | None = None
    while core.has_work:
        outputs = core.step()
        now = time.perf_counter()
        failed = next((output.error for output in outputs if output.error), None)
        if failed is not None:
            raise RuntimeError(failed)
        full = len(outputs) == num_rows
        if full and last is not None:
            gaps.append(now - last)
        if outputs or last is None:
            last = now if full else None
    if len(gaps) < 2:
        raise RuntimeError(f"too few steps had all {num_rows} rows; give more tokens out")
    return statistics.fmean(gaps[1:]) * 1e3  # the first is since the prompts


def measure(core: EngineCore, k: int, batch: list[int], args: argparse.Namespace, deadline: float) -> list[Row]:
    """Rows of every batch size that there was time for (time.monotonic)."""
    lengths = DraftLengths(core)
    rows: list[Row] = []
    for num_rows in batch:
        taken: dict[int, list[float]] = {0: [], k: []}
        for turn in range(1 + args.repeats):
            if time.monotonic() > deadline:
                break
            for length in (0, k) if turn % 2 else (k, 0):
                lengths.fixed(length)
                ms = step_ms(core, num_rows, args.input, args.output, turn)
                if turn:  # the first turn warms up
                    taken[length].append(ms)
        if not taken[0] or not taken[k]:
            print(f"not run: batch {num_rows}, out of time", flush=True)
            continue
        ratios = [break_even(plain, spec) for plain, spec in zip(taken[0], taken[k], strict=True)]
        plain, spec = (statistics.median(ms) for ms in taken.values())
        note = f"tokens a step; k = {k}: {spec:.3f} ms, plain {plain:.3f} ms in the same engine"
        rows.append(median_row(f"{device_name(core)}/break_even/{args.label}/b{num_rows}", ratios, "tokens", note))
        print(rows[-1], flush=True)
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="random:llama-3.1-8b", help="a model, or random:SHAPE")
    parser.add_argument("--label", default="8b-eagle3", help="model and drafter in case names")
    parser.add_argument("--drafter", default="eagle3")
    parser.add_argument("--draft-model")
    parser.add_argument("--device", default="auto")
    parser.add_argument("--k", type=int, default=4)
    parser.add_argument("--batch", default="1,64")
    parser.add_argument("--input", type=int, default=128)
    parser.add_argument("--output", type=int, default=256)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--budget", type=float, default=1e9, help="seconds after which nothing is begun")
    parser.add_argument("--name", help="of the result file")
    args = parser.parse_args()
    started = time.monotonic()
    batch = [int(text) for text in args.batch.split(",")]
    most, longest = max(batch), args.input + args.output
    core = build(
        args.drafter,
        find=find,
        model=args.model,
        draft_model=args.draft_model,
        device=args.device,
        max_draft_tokens=args.k,
        adaptive=False,
        max_num_seqs=most,
        prefix_cache=False,
        kv_cache_tokens=most * (longest + 96),
        max_model_len=longest + 64,
        max_num_batched_tokens=min(most * args.input, 16384),
    )
    print(f"ready after {time.monotonic() - started:.1f} s", flush=True)
    with frozen_start():
        rows = measure(core, args.k, batch, args, started + args.budget)
    write_result(args.name or f"{device_name(core)}_break_even", rows)
    sys.exit(0 if len(rows) == len(batch) else 1)


if __name__ == "__main__":
    main()
