"""Real text on a GPU: plain decoding, suffix drafts at a fixed length, and as many as the policy finds worth it.

    python benchmarks/gpu_text.py [--prompts FILE] [--model DIR] [--alone 4] [--batch 16] [--max-tokens 256]

Both turns of each prompt, at most 256 new tokens, end-of-sequence honoured; the second turn follows the plain answer of
the first, so that all ways run the same prompts. Batches hold one category each. All ways share one engine, a request
switching its drafts off, and take turns, the order reversed each time. *Emitted per step* is tokens by verify steps of
all answers of a category; the speed-up is output tokens a second against plain, prompts included. Each has its mean
over categories, and again without answers that fall into a loop when they are decoded plainly.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import time
from collections import defaultdict
from dataclasses import dataclass
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from benchmarks import omp  # noqa: F401  before torch

# isort: split

from benchmarks.common import PROMPTS, Row, write_result
from benchmarks.engine import Prompter, build
from benchmarks.text.conversations import Conversation, by_category, load_conversations, loops
from server.core import Request, SamplingParams, SpeculationParams
from server.engine.core import EngineCore
from server.text.chat_template import encode_chat

PLAIN, FIXED, POLICY = "plain", "suffix", "suffix-adaptive"
GREEDY = SamplingParams(temperature=0.0)


@dataclass(frozen=True)
class Answered:
    """What one way did with some prompts at once: token ids, verify steps a prompt, seconds for all."""

    tokens: list[list[int]]
    steps: list[int]
    seconds: float


@dataclass
class Total:
    """Sums over the answers of a category, of one way at one batch size."""

    emitted: int = 0
    steps: int = 0
    tokens: int = 0
    seconds: float = 0.0


def answer(core: EngineCore, prompts: list[list[int]], max_tokens: int, way: str) -> Answered:
    """All prompts at once. The policy is the engine's own; the fixed length is its most draft tokens."""
    costs = core.speculation.costs
    if way != POLICY:
        core.speculation.costs = None  # without one every step drafts as much as it may
    stamp = time.time_ns()
    wish = SpeculationParams(enabled=way != PLAIN)
    requests = [Request(f"{stamp}-{i}", ids, GREEDY, wish, max_tokens=max_tokens) for i, ids in enumerate(prompts)]
    order = {r.request_id: i for i, r in enumerate(requests)}
    tokens: list[list[int]] = [[] for _ in requests]
    outputs = [0] * len(requests)
    started = time.perf_counter()
    for output in core.generate(requests):
        if output.error:
            raise RuntimeError(output.error)
        tokens[order[output.request_id]] += output.token_ids
        outputs[order[output.request_id]] += 1
    seconds = time.perf_counter() - started
    core.speculation.costs = costs
    return Answered(tokens, [n - 1 for n in outputs], seconds)  # the first token is the prompt's


class Measurement:
    """Totals by (batch name, way, category, whether the answer loops)."""

    def __init__(self, core: EngineCore, prompter: Prompter, max_tokens: int, max_prompt: int) -> None:
        self.core, self.prompter, self.max_tokens, self.max_prompt = core, prompter, max_tokens, max_prompt
        self.totals: dict[tuple[str, str, str, bool], Total] = defaultdict(Total)
        self.num_same = self.num_answers = 0
        self._order = [PLAIN, FIXED, POLICY]

    def talk(self, conversations: list[Conversation], name: str) -> None:
        """Both turns of some prompts of one category, at once."""
        for conversation in conversations:
            conversation.messages, conversation.loops = [], False
        for turn in range(max(len(c.turns) for c in conversations)):
            self._turn([c for c in conversations if turn < len(c.turns)], turn, name)

    def _turn(self, conversations: list[Conversation], turn: int, name: str) -> None:
        prompts = []
        for c in conversations:
            c.messages.append({"role": "user", "content": c.turns[turn]})
            prompts.append(encode_chat(self.prompter.tokenizer, self.prompter.template, c.messages)[: self.max_prompt])
        self._order.reverse()
        found = {way: answer(self.core, prompts, self.max_tokens, way) for way in self._order}
        for c, tokens in zip(conversations, found[PLAIN].tokens, strict=True):
            c.messages.append({"role": "assistant", "content": self.prompter.tokenizer.decode(tokens)})
            c.loops = loops(tokens)
        self.num_answers += 2 * len(conversations)
        for way, got in found.items():
            self._add(name, way, conversations, got)
            if way != PLAIN:
                self.num_same += sum(a == b for a, b in zip(got.tokens, found[PLAIN].tokens, strict=True))

    def _add(self, name: str, way: str, conversations: list[Conversation], got: Answered) -> None:
        whole = sum(map(len, got.tokens))
        for c, tokens, steps in zip(conversations, got.tokens, got.steps, strict=True):
            total = self.totals[name, way, c.category, c.loops]
            total.emitted += len(tokens) - 1
            total.steps += steps
            total.tokens += len(tokens)
            total.seconds += got.seconds * len(tokens) / whole

    def total(self, name: str, way: str, category: str, *, with_loops: bool) -> Total:
        parts = [self.totals[name, way, category, looping] for looping in ((False, True) if with_loops else (False,))]
        return Total(*(sum(getattr(p, f) for p in parts) for f in ("emitted", "steps", "tokens", "seconds")))


def report(m: Measurement, name: str, categories: list[str], model: str) -> list[Row]:
    rows = []
    for way in (FIXED, POLICY):
        for with_loops in (True, False):
            emitted: dict[str, float] = {}
            speedup: dict[str, float] = {}
            for category in categories:
                plain = m.total(name, PLAIN, category, with_loops=with_loops)
                total = m.total(name, way, category, with_loops=with_loops)
                if total.steps and plain.seconds:
                    emitted[category] = total.emitted / total.steps
                    speedup[category] = (total.tokens / total.seconds) / (plain.tokens / plain.seconds)
            suffix = "" if with_loops else "/without-loops"
            for kind, unit, values in (("emitted_per_step", "tokens", emitted), ("speedup", "x", speedup)):
                case = f"h100/{kind}/{model}-{way}/{name}"
                if with_loops:
                    rows += [Row(f"{case}/{category}", round(v, 3), unit) for category, v in values.items()]
                if values:
                    note = f"mean of {len(values)} categories"
                    rows.append(
                        Row(f"{case}/macro{suffix}", round(statistics.mean(values.values()), 3), unit, None, note)
                    )
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="smollm2-135m")
    parser.add_argument("--label", default="smollm2", help="the model in case names")
    parser.add_argument("--prompts", type=Path, default=PROMPTS)
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--alone", type=int, default=4, help="prompts of each category that also run one by one")
    parser.add_argument("--batch", type=int, default=16)
    parser.add_argument("--max-tokens", type=int, default=256)
    parser.add_argument("--max-prompt", type=int, default=4096, help="longer conversations are cut")
    parser.add_argument("--max-draft-tokens", type=int, default=7)
    parser.add_argument("--seconds", type=float, default=140.0, help="stop after so long; what is measured is reported")
    args = parser.parse_args()
    started = time.perf_counter()
    groups = by_category(load_conversations(args.prompts))
    core = build(
        "suffix",
        model=args.model,
        device=args.device,
        max_draft_tokens=args.max_draft_tokens,
        max_num_seqs=args.batch,
        prefix_cache=False,
        kv_cache_tokens=args.batch * (args.max_prompt + args.max_tokens + 64),
        max_model_len=args.max_prompt + args.max_tokens + 16,
        max_num_batched_tokens=8192,
    )
    m = Measurement(core, Prompter(args.model), args.max_tokens, args.max_prompt)
    print(f"{time.perf_counter() - started:6.1f} s  ready", flush=True)
    m.talk([next(iter(groups.values()))[0]], "warm-up")
    batched = [
        (cs[i : i + args.batch], f"b{args.batch}") for cs in groups.values() for i in range(0, len(cs), args.batch)
    ]
    singly = [([cs[i]], "b1") for i in range(args.alone) for cs in groups.values() if i < len(cs)]
    for done, (conversations, name) in enumerate([*batched, *singly]):
        if time.perf_counter() - started > args.seconds:
            print(f"out of time after {done} of {len(batched) + len(singly)} runs", flush=True)
            break
        m.talk(conversations, name)
    print(f"{time.perf_counter() - started:6.1f} s  done", flush=True)
    rows = [row for name in ("b1", f"b{args.batch}") for row in report(m, name, list(groups), args.label)]
    for name in ("b1", f"b{args.batch}"):
        whole = [total for (n, way, _, _), total in m.totals.items() if n == name and way == PLAIN]
        if whole:
            rate = sum(t.tokens for t in whole) / sum(t.seconds for t in whole)
            rows.append(
                Row(f"h100/text_tok_s/{args.label}-plain/{name}", round(rate, 1), "tok/s", None, "prompts included")
            )
    num_misses = core.stats().num_graph_misses
    detail = {"same_as_plain": m.num_same, "answers_with_drafts": m.num_answers, "graph_misses": num_misses}
    print(detail)
    write_result("h100_text", rows, detail)


if __name__ == "__main__":
    main()
