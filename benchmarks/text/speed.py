"""Tokens a second of one stream on real text: plain, every fixed draft length, and the length that the engine chooses.

First turns of a fixed sample of the evaluation prompts, greedy, one at a time. All ways share one engine and take turns
prompt by prompt, the order reversed each time, so that a machine that grows slower does so for all. Plain is that
engine with its drafter not running. The figure of a pass is tokens after each answer's first by the seconds that they
took: decoding without the prompt. Passes over the sample are repeated; medians and ranges are of passes.
"""

from __future__ import annotations

import argparse
import gc
import statistics
import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch

from benchmarks.common import Prompt, Row, median_row, write_result
from benchmarks.engine import CANNOT_BUILD, Prompter, build, device_name
from benchmarks.quantised import FORMATS, Quantised
from benchmarks.text.closed_loop import Answer, closed_loop
from benchmarks.text.conversations import Conversation, by_category, interleaved, load_conversations
from benchmarks.text.draft_length import DraftLengths
from benchmarks.widen import PREFIX, Widened
from server.core import Request, SamplingParams
from server.engine.collector import frozen_start
from server.engine.core import EngineCore
from server.models.source import resolve

PLAIN, ADAPTIVE = "plain", "adaptive"
WARM_PROMPTS = 1
SPEED_TOKENS = 128
GREEDY = SamplingParams(temperature=0.0)


@dataclass
class Pass:
    """One pass of one way over the sample: tokens after each answer's first, in so many steps and seconds."""

    tokens: int = 0
    steps: int = 0
    seconds: float = 0.0

    def add(self, answer: Answer) -> None:
        self.tokens += len(answer.tokens) - 1
        self.steps += len(answer.verdicts)
        self.seconds += answer.last_s - answer.first_s

    @property
    def tok_s(self) -> float:
        return self.tokens / self.seconds

    @property
    def step_ms(self) -> float:
        return 1e3 * self.seconds / self.steps


class SingleStream:
    """One engine and its ways: `plain`, `adaptive` and a `kN` for each of `fixed` (None: all it may choose)."""

    def __init__(self, core: EngineCore, prompter: Prompter, max_tokens: int, fixed: Sequence[int] | None) -> None:
        self.core, self.prompter, self.max_tokens = core, prompter, max_tokens
        self.lengths = DraftLengths(core)
        self.ways = [PLAIN, ADAPTIVE, *(f"k{k}" for k in (self.lengths.tiers if fixed is None else fixed))]
        self.passes: dict[str, list[Pass]] = {way: [] for way in self.ways}
        self._turn = 0

    def run(self, way: str, conversation: Conversation) -> Answer:
        """One answer; alone on the machine."""
        if way == ADAPTIVE:
            self.lengths.adaptive()
        else:
            self.lengths.fixed(0 if way == PLAIN else int(way.removeprefix("k")))
        ids = self.prompter.ids(_first(conversation))
        pending = [Request(f"speed-{time.time_ns()}", ids, GREEDY, max_tokens=self.max_tokens)]
        answers: list[Answer] = []
        gc.collect()
        closed_loop(
            self.core,
            lambda: pending.pop() if pending else None,
            1,
            lambda request, answer: answers.append(answer),
            drain=True,
        )
        return answers[0]

    def sweep(self, sample: list[Conversation], deadline: float) -> int:
        """One pass of every way, or as much of the first as can begin before `deadline` (time.monotonic).

        Returns how many prompts it got through; a later pass that is cut off does not count.
        """
        found = {way: Pass() for way in self.ways}
        done = 0
        for conversation in sample:
            if time.monotonic() > deadline:
                break
            order = self.ways if self._turn % 2 else self.ways[::-1]
            self._turn += 1
            for way in order:
                found[way].add(self.run(way, conversation))
            done += 1
        if done == len(sample) or (done and not self.passes[PLAIN]):
            for way, one in found.items():
                self.passes[way].append(one)
        return done


def rows_of(stream: SingleStream, device: str, label: str, drafter: str, note: str) -> list[Row]:
    """The engine's own choice under the case's name, the ways below it; and what it gains on plain, pass by pass."""
    case = f"{device}/tok_s/{label}-{drafter}/b1"
    rows = []
    for way in (ADAPTIVE, *(w for w in stream.ways if w != ADAPTIVE)):
        passes = stream.passes[way]
        emitted = sum(p.tokens for p in passes) / sum(p.steps for p in passes)
        told = f"{way}; {emitted:.3f} tokens a step of {statistics.median(p.step_ms for p in passes):.3f} ms; {note}"
        name = case if way == ADAPTIVE else f"{case}/{way}"
        rows.append(median_row(name, [p.tok_s for p in passes], "tok/s", told))
    plain = stream.passes[PLAIN]
    for way in stream.ways:
        if way != PLAIN:
            ratios = [p.tok_s / q.tok_s for p, q in zip(stream.passes[way], plain, strict=True)]
            name = f"{device}/speedup/{label}-{drafter}/b1" + ("" if way == ADAPTIVE else f"/{way}")
            rows.append(median_row(name, ratios, "x", f"{way} to plain in the same pass"))
    return rows


def _build(args: argparse.Namespace, drafter: str, draft_model: str | None, max_tokens: int) -> EngineCore:
    prefix = PREFIX if args.widened else ""
    longest = args.max_prompt + max_tokens
    name = resolve(draft_model).directory if draft_model is not None and prefix else draft_model
    find = Widened(args.shape, args.model) if args.widened else resolve
    forms = FORMATS[args.quantise], FORMATS[args.quantise_head]
    return build(
        drafter,
        find=Quantised(find, forms[0], None, forms[1], prefix + args.model) if any(forms) else find,
        model=prefix + args.model,
        draft_model=None if name is None else f"{prefix}{name}",
        device=args.device,
        dtype=args.dtype,
        max_draft_tokens=args.k,
        max_num_seqs=1,
        prefix_cache=False,
        kv_cache_tokens=longest + 64,
        max_model_len=longest + 16,
        max_num_batched_tokens=args.max_prompt,
    )


def _sample(args: argparse.Namespace, prompter: Prompter) -> list[Conversation]:
    """The first `--limit` (1) prompts of each category that are at most `--max-prompt` tokens long."""
    short = [c for c in load_conversations(args.prompts) if len(prompter.ids(_first(c))) <= args.max_prompt]
    return interleaved(c for cs in by_category(short).values() for c in cs[: args.limit or 1])


def _first(conversation: Conversation) -> Prompt:
    return Prompt(conversation.name, conversation.category, conversation.turns[0])


def _passes(stream: SingleStream, sample: list[Conversation], wanted: int, deadline: float) -> str:
    """Warms up and runs; what there was no time for."""
    for conversation in sample[:WARM_PROMPTS]:
        for way in stream.ways if time.monotonic() < deadline else ():
            stream.run(way, conversation)
    for number in range(wanted):
        started = time.monotonic()
        done = stream.sweep(sample, deadline)
        took = time.monotonic() - started
        if stream.passes[PLAIN]:
            rates = ", ".join(f"{way} {passes[-1].tok_s:.0f}" for way, passes in stream.passes.items())
            print(f"  pass {number + 1} of {wanted}, {done} prompts, {took:.1f} s: {rates} tok/s", flush=True)
        if done < len(sample):
            return f"pass {number + 1} of {wanted} got through {done} of {len(sample)} prompts"
    return ""


def measure(args: argparse.Namespace, drafters: list[tuple[str, str | None]]) -> list[str]:
    """Every (drafter, its model) in turn, and a result after each; what could not be run, and why."""
    deadline = time.monotonic() + args.budget
    max_tokens = args.max_tokens or SPEED_TOKENS
    prompter = Prompter(args.model)
    sample = _sample(args, prompter)
    rows: list[Row] = []
    left_out: list[str] = []
    detail: dict[str, Any] = {"left_out": left_out, "prompts": [c.name for c in sample]}
    for drafter, draft_model in drafters:
        started = time.monotonic()
        try:
            core = _build(args, drafter, draft_model, max_tokens)
        except CANNOT_BUILD as error:
            left_out.append(f"{drafter}: {error}")
            continue
        print(f"== {drafter}: ready after {time.monotonic() - started:.1f} s", flush=True)
        fixed = None if args.fixed is None else [int(k) for k in args.fixed.split(",")]
        stream = SingleStream(core, prompter, max_tokens, fixed)
        with frozen_start():
            cut = _passes(stream, sample, args.passes, deadline)
        left_out += [f"{drafter}: {cut}"] if cut else []
        if stream.passes[PLAIN]:
            label = args.label + ("-widened" if args.widened else "")
            note = f"{len(sample)} prompts, {max_tokens} tokens each" + (f"; CUT OFF: {cut}" if cut else "")
            rows += rows_of(stream, device_name(core), label, drafter, note)
            name = args.name or f"{device_name(core)}_{'widened' if args.widened else 'text'}_speed"
            write_result(name, rows, detail, show=drafter == drafters[-1][0])
        del core, stream
        gc.collect()
        if torch.cuda.is_available():
            torch.cuda.empty_cache()
    return left_out
