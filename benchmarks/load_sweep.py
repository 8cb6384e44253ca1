"""Throughput of the engine's own draft length beside plain decoding and every fixed length, from one stream to many.

    python benchmarks/load_sweep.py [--drafter eagle3] [--draft-model DIR] [--streams 1,2,4,…] [--rounds 7] [--budget S]

A closed loop: each stream sends its next prompt when the last is answered. A cell is one way at one number of streams;
all ways get the same prompts in the same order, and a cell lasts for as long as there are prompts for all streams: the
work is fixed, not the time, since texts differ more than ways do. Tokens until then by seconds, prompts included. A
round is every way at every point; each round begins with another way, and every second one goes backwards. A ratio is
that of two ways' medians over rounds, its interval that of a bootstrap over rounds (95 %), and each has a verdict: met
or missed where the whole interval lies on one side of the target, else not shown. The best fixed length is the one with
the highest median, chosen from the same rounds, which favours it a little. One engine serves all ways but plain, its
draft length set from cell to cell, so nothing is captured anew. Plain is an engine without a drafter (`--plain own`, on
a GPU) or the same one with its drafter off (`same`, on a CPU, where a second copy of the weights differs in speed by
where it lies). What is about to be run, and for how long, is printed before the first cell.
"""

from __future__ import annotations

import argparse
import gc
import statistics
import sys
import time
import tomllib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from benchmarks import omp  # noqa: F401  before torch

# isort: split

import torch

from benchmarks.common import PROMPTS, RESULTS, Prompt, Row, median_row, write_result
from benchmarks.engine import Prompter, build, device_name
from benchmarks.report import target_of
from benchmarks.text.closed_loop import closed_loop
from benchmarks.text.conversations import interleaved, load_conversations
from benchmarks.text.draft_length import DraftLengths
from benchmarks.text.plot import plot_sweep
from benchmarks.text.ratios import ratio_of_medians
from server.core import Request, SamplingParams
from server.engine.collector import frozen_start
from server.engine.core import EngineCore
from server.models.loader import pick_device

PLAIN, ADAPTIVE = "plain", "adaptive"
GREEDY = SamplingParams(temperature=0.0)


@dataclass(frozen=True)
class Defaults:
    """What suits a device. A cell takes about `cell_s` seconds, from MANY streams on `many_s`, and has at least
    `per_stream` prompts for each stream, so that streams mix. `tok_s` is about what plain decoding does by number of
    streams: for the plan only."""

    streams: str
    cell_s: float
    many_s: float
    per_stream: int
    max_tokens: int
    max_prompt: int
    rounds: int
    fixed: str | None
    plain: str
    tok_s: dict[int, float]
    prompt_tok_s: float


GPU = Defaults(
    streams="1,2,4,8,16,32,64,128",
    cell_s=1.5,
    many_s=2.5,
    per_stream=4,
    max_tokens=128,
    max_prompt=1024,
    rounds=7,
    fixed=None,
    plain="own",
    tok_s={1: 2300, 2: 4300, 4: 7100, 8: 12300, 16: 17200, 32: 23800, 64: 37000, 128: 52700},
    prompt_tok_s=200_000,
)
CPU = Defaults(
    streams="1,2,4,8,16",
    cell_s=6.0,
    many_s=9.0,
    per_stream=2,
    max_tokens=48,
    max_prompt=200,
    rounds=7,
    fixed="1,2,5",
    plain="same",
    tok_s={1: 170, 2: 270, 4: 390, 8: 450, 16: 430},
    prompt_tok_s=2000,
)
MANY = 16
"""Streams from which on a cell has to be longer: it begins and ends with all of them at once."""
MEAN_PROMPT_SHARE = 0.4
"""Of `max_prompt`: about what a prompt of the sample has."""


def num_prompts(streams: int, d: Defaults) -> int:
    """Prompts of a cell that takes as long as it should plainly."""
    seconds = d.max_tokens / d.tok_s[streams] + MEAN_PROMPT_SHARE * d.max_prompt / d.prompt_tok_s
    return max(d.per_stream * streams, round((d.many_s if streams >= MANY else d.cell_s) / seconds))


def plan(points: list[int], num_ways: int, rounds: int, d: Defaults) -> tuple[str, float]:
    """What will be run, as text, and about how many seconds it will take if every way is as slow as plain."""
    lines, total = [], 0.0
    for streams in points:
        count = num_prompts(streams, d)
        seconds = count * (d.max_tokens / d.tok_s[streams] + MEAN_PROMPT_SHARE * d.max_prompt / d.prompt_tok_s)
        total += seconds * num_ways * rounds
        lines.append(f"  {streams:4} streams: {count:4} prompts a cell, about {seconds:.1f} s")
    head = f"{len(points)} points x {num_ways} ways x {rounds} rounds, about {total:.0f} s and one round to warm up"
    return "\n".join([head, *lines]), total


class Sweep:
    """Tokens a second by (streams, way), one entry a round."""

    def __init__(
        self,
        core: EngineCore,
        plain: EngineCore | None,
        fixed: list[int] | None,
        prompts: list[list[int]],
        max_tokens: int,
    ) -> None:
        self.core, self.plain, self.prompts, self.max_tokens = core, plain, prompts, max_tokens
        self.lengths = DraftLengths(core)
        self.ways = [PLAIN, ADAPTIVE, *(f"k{k}" for k in (self.lengths.tiers if fixed is None else fixed))]
        self.rates: dict[tuple[int, str], list[float]] = {}

    def order(self, number: int) -> list[str]:
        """The ways in the order of round `number`: each begins in turn, and goes before and after each other."""
        at = number % len(self.ways)
        ways = [*self.ways[at:], *self.ways[:at]]
        return ways if number % 2 else ways[::-1]

    def point(self, streams: int, count: int, deadline: float, number: int) -> dict[str, float] | None:
        """One cell of every way in round `number`: tokens a second. None if not all could begin before `deadline`
        (time.monotonic)."""
        found: dict[str, float] = {}
        for way in self.order(number):
            if time.monotonic() > deadline:
                return None
            found[way] = self.cell(way, streams, count)
        return found

    def cell(self, way: str, streams: int, count: int) -> float:
        core = self.core
        if way == PLAIN and self.plain is not None:
            core = self.plain
        elif way == ADAPTIVE:
            self.lengths.adaptive()
        else:
            self.lengths.fixed(0 if way == PLAIN else int(way.removeprefix("k")))
        requests = self._requests(count)
        gc.collect()
        if core.runner.model.device.type == "cuda":
            torch.cuda.synchronize()
        return closed_loop(core, lambda: next(requests, None), streams, drain=False).tok_s

    def _requests(self, count: int) -> Iterator[Request]:
        stamp = time.time_ns()
        for i in range(count):
            ids = self.prompts[i % len(self.prompts)]
            yield Request(f"{stamp}-{i}", ids, GREEDY, max_tokens=self.max_tokens)

    def keep(self, streams: int, rates: dict[str, float]) -> None:
        for way, rate in rates.items():
            self.rates.setdefault((streams, way), []).append(rate)


def best_fixed(rates: dict[str, list[float]]) -> str:
    """The fixed length, plain decoding among them, with the highest median."""
    return max((way for way in rates if way != ADAPTIVE), key=lambda way: statistics.median(rates[way]))


def rows_of(sweep: Sweep, points: list[int], device: str, name: str) -> list[Row]:
    """Both ratios at every point that was run, with verdicts, and every way's tokens a second."""
    targets = tomllib.loads((Path(__file__).resolve().parent / "targets.toml").read_text())["cases"]
    rows: list[Row] = []
    for streams in points:
        rates = {way: sweep.rates[streams, way] for way in sweep.ways if (streams, way) in sweep.rates}
        if not rates:
            continue
        best = best_fixed(rates)
        for kind, other in (("adaptive_vs_plain", PLAIN), ("adaptive_vs_best_fixed", best)):
            case, ratio = f"{device}/{kind}/{name}/b{streams}", ratio_of_medians(rates[ADAPTIVE], rates[other])
            target = target_of(case, targets)
            verdict = ratio.verdict(float(target["target"])) if target is not None else ""
            ours, theirs = (statistics.median(rates[way]) for way in (ADAPTIVE, other))
            note = f"{ours:.0f} to {theirs:.0f} tok/s ({other}); {len(rates[other])} rounds; spread: 95 % interval"
            spread = (round(ratio.low, 4), round(ratio.high, 4))
            rows.append(Row(case, round(ratio.value, 4), "x", spread, note, verdict))
        rows += [median_row(f"{device}/sweep_tok_s/{name}-{w}/b{streams}", r, "tok/s") for w, r in rates.items()]
    return rows


def run(sweep: Sweep, points: list[int], rounds: int, d: Defaults, deadline: float) -> str:
    """All rounds there is time for, each point by point; the first one warms up. What there was no time for."""
    for number in range(1 + rounds):
        for streams in points:
            count = num_prompts(streams, d) if number else streams
            started = time.monotonic()
            rates = sweep.point(streams, count, deadline, number)
            if rates is None:
                return f"round {number} of {rounds} from {streams} streams on"
            took = time.monotonic() - started
            shown = ", ".join(f"{way} {rates[way]:.0f}" for way in sweep.ways)
            print(f"  round {number}, {streams:3} streams, {took:5.1f} s: {shown} tok/s", flush=True)
            if number:
                sweep.keep(streams, rates)
    return ""


def _prompts(args: argparse.Namespace, max_prompt: int) -> list[list[int]]:
    """First turns of all prompts that are at most `max_prompt` tokens long, categories in turn."""
    prompter = Prompter(args.model)
    all_of_them = interleaved(load_conversations(args.prompts))
    found = [prompter.ids(Prompt(c.name, c.category, c.turns[0])) for c in all_of_them]
    return [ids for ids in found if len(ids) <= max_prompt]


def options() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="smollm2-135m")
    parser.add_argument("--label", default="smollm2", help="the model in case names")
    parser.add_argument("--drafter", default="eagle3")
    parser.add_argument("--draft-model")
    parser.add_argument("--prompts", type=Path, default=PROMPTS)
    parser.add_argument("--device", default="auto")
    parser.add_argument("--k", type=int, default=5, help="the most draft tokens")
    parser.add_argument("--streams", help="comma-separated")
    parser.add_argument("--fixed", help="draft lengths, comma-separated (default: 1,2,5 on a CPU, all tiers on a GPU)")
    parser.add_argument("--rounds", type=int)
    parser.add_argument("--plain", choices=("own", "same"))
    parser.add_argument("--budget", type=float, default=900.0, help="seconds, start-up included")
    parser.add_argument("--plan", action="store_true", help="print what would be run and leave")
    parser.add_argument("--name", help="of the result file")
    return parser


def main() -> None:
    args = options().parse_args()
    started = time.monotonic()
    d = GPU if pick_device(args.device).type == "cuda" else CPU
    points = [int(text) for text in (args.streams or d.streams).split(",")]
    fixed_text = args.fixed or d.fixed
    fixed = None if fixed_text is None else [int(text) for text in fixed_text.split(",")]
    rounds = args.rounds or d.rounds
    prompts = _prompts(args, d.max_prompt)
    num_ways = 2 + (len(fixed) if fixed is not None else 4)
    print(f"{len(prompts)} prompts; {plan(points, num_ways, rounds, d)[0]}", flush=True)
    if args.plan:
        return
    settings = {
        "model": args.model,
        "device": args.device,
        "max_num_seqs": max(points),
        "prefix_cache": False,
        "kv_cache_tokens": max(points) * (d.max_prompt + d.max_tokens + 64),
        "max_model_len": d.max_prompt + d.max_tokens + 16,
    }
    core = build(args.drafter, draft_model=args.draft_model, max_draft_tokens=args.k, **settings)
    plain = build("none", **settings) if (args.plain or d.plain) == "own" else None
    print(f"ready after {time.monotonic() - started:.1f} s", flush=True)
    sweep = Sweep(core, plain, fixed, prompts, d.max_tokens)
    with frozen_start():
        cut = run(sweep, points, rounds, d, started + args.budget)
    device, name = device_name(core), f"{args.label}-{args.drafter}"
    rows = rows_of(sweep, points, device, name)
    detail = {"not_run": cut, "graph_misses": core.stats().num_graph_misses, "rounds": rounds}
    file = write_result(args.name or f"{device}_sweep_{args.drafter}", rows, detail)
    if rows:
        plot_sweep(rows, file.stem, RESULTS / f"{file.stem}.svg")
    print(f"not run: {cut}" if cut else "all was run", flush=True)
    sys.exit(1 if cut else 0)


if __name__ == "__main__":
    main()
