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
import zlib
from collections import deque
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from benchmarks import omp  # noqa: F401  before torch

# isort: split

import torch

from benchmarks.common import PROMPTS, Row, write_result
from benchmarks.engine import Prompter, build, device_name
from benchmarks.text.acceptance import Total, macro, macro_survival, table, total
from benchmarks.text.closed_loop import Answer, closed_loop
from benchmarks.text.conversations import Conversation, by_category, interleaved, load_conversations, loops
from benchmarks.text.draft_length import DraftLengths
from benchmarks.text.speed import measure
from server.config import DRAFTERS, ConfigError
from server.core import Request, SamplingParams
from server.engine.core import EngineCore
from server.models.loader import pick_device
from server.text.chat_template import encode_chat

MODES = ("greedy", "t08")
WITH_HEAD = ("eagle3", "hybrid")
"""Drafters that take `--draft-model`."""
GPU_STREAMS, CPU_STREAMS = 64, 8
GPU_BATCHED_TOKENS = 8192
MAX_TOKENS = 256
PROGRESS_S = 10.0


@dataclass(frozen=True)
class Job:
    """One engine: a drafter under a rule, and the modes it runs."""

    drafter: str
    rule: str
    modes: tuple[str, ...]

    def case(self, device: str, label: str, mode: str) -> str:
        suffix = "" if self.rule == "coupled" else f"-{self.rule}"
        return f"{device}/emitted_per_step/{label}-{self.drafter}/{mode}{suffix}"


@dataclass
class Talk:
    """What one drafter said in one mode: (category, answer), and how many answers there would have been in all."""

    categories: list[str]
    wanted: int
    answers: list[tuple[str, Answer]] = field(default_factory=list)

    def totals(self, *, with_loops: bool = True) -> dict[str, Total]:
        """By category, in a fixed order, those without a verify step too."""
        kept: dict[str, list[Answer]] = {category: [] for category in self.categories}
        for category, answer in self.answers:
            if with_loops or not loops(answer.tokens):
                kept[category].append(answer)
        return {category: total(answers) for category, answers in kept.items()}

    @property
    def num_loops(self) -> int:
        return sum(loops(answer.tokens) for _, answer in self.answers)


class Talker:
    """Runs conversations; remembers, for every mode, the first answer that was given to each turn."""

    def __init__(self, prompter: Prompter, max_tokens: int, max_prompt: int) -> None:
        self.prompter, self.max_tokens, self.max_prompt = prompter, max_tokens, max_prompt
        self._said: dict[tuple[str, str, int], str] = {}

    def talk(
        self, core: EngineCore, conversations: list[Conversation], mode: str, num_streams: int, deadline: float
    ) -> Talk:
        """All turns of all conversations, except those that would begin after `deadline` (time.monotonic)."""
        talk = Talk(list(by_category(conversations)), sum(len(c.turns) for c in conversations))
        pending = deque((c, 0) for c in conversations)
        asked: dict[str, tuple[Conversation, int]] = {}
        stamp, told = time.time_ns(), time.monotonic()

        def next_request() -> Request | None:
            if not pending or time.monotonic() > deadline:
                return None
            conversation, turn = pending.popleft()
            name = f"{stamp}-{conversation.name}-{turn}"
            asked[name] = (conversation, turn)
            ids = self._prompt(conversation, turn, mode)
            return Request(name, ids, _sampling(conversation, turn, mode), max_tokens=self.max_tokens)

        def on_answer(request: Request, answer: Answer) -> None:
            nonlocal told
            conversation, turn = asked.pop(request.request_id)
            talk.answers.append((conversation.category, answer))
            self._said.setdefault((mode, conversation.name, turn), self.prompter.tokenizer.decode(answer.tokens))
            if turn + 1 < len(conversation.turns):
                pending.appendleft((conversation, turn + 1))
            if time.monotonic() - told > PROGRESS_S:
                told = time.monotonic()
                print(f"  {len(talk.answers)} of {talk.wanted} answers", flush=True)

        closed_loop(core, next_request, num_streams, on_answer, drain=True)
        return talk

    def _prompt(self, conversation: Conversation, turn: int, mode: str) -> list[int]:
        messages = []
        for i, text in enumerate(conversation.turns[: turn + 1]):
            messages.append({"role": "user", "content": text})
            if i < turn:
                messages.append({"role": "assistant", "content": self._said[mode, conversation.name, i]})
        ids = encode_chat(self.prompter.tokenizer, self.prompter.template, messages)
        if len(ids) > self.max_prompt:
            raise ValueError(f"{conversation.name}: {len(ids)} tokens are too long; raise --max-prompt")
        return ids


def _sampling(conversation: Conversation, turn: int, mode: str) -> SamplingParams:
    if mode == "greedy":
        return SamplingParams(temperature=0.0)
    return SamplingParams(temperature=0.8, seed=zlib.crc32(f"{conversation.name}/{turn}".encode()))


def rows_of(case: str, talk: Talk, what: str) -> list[Row]:
    """The mean over categories, the same without loops, and every category."""
    everything, without = (_stepped(talk.totals(with_loops=with_loops)) for with_loops in (True, False))
    if not everything:
        return []
    unfinished = talk.wanted - len(talk.answers)
    cut = f"CUT OFF: {unfinished} of {talk.wanted} answers not run; " if unfinished else ""
    shares = " ".join(f"{share:.2f}" for share in macro_survival(everything))
    note = f"{cut}mean of {len(everything)} categories, {what}; accepted by position {shares}"
    rows = [Row(case, round(macro(everything), 3), "tokens", None, note)]
    if without:
        note = (
            f"{cut}mean of {len(without)} categories, without {talk.num_loops} of {len(talk.answers)} answers that loop"
        )
        rows.append(Row(f"{case}/no-loops", round(macro(without), 3), "tokens", None, note))
    for category, t in everything.items():
        note = f"{t.emitted} tokens in {t.steps} steps of {t.answers} answers"
        rows.append(Row(f"{case}/{category}", round(t.emitted_per_step, 3), "tokens", None, note))
    return rows


def _stepped(totals: dict[str, Total]) -> dict[str, Total]:
    return {category: t for category, t in totals.items() if t.steps}


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
        except ConfigError as error:
            self.left_out.append(f"{job.drafter} {job.rule}: {error}")
            return
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
