"""What a drafter says on the evaluation prompts, turn by turn, and how it is reported."""

from __future__ import annotations

import time
import zlib
from collections import deque
from dataclasses import dataclass, field

from benchmarks.common import Row
from benchmarks.engine import Prompter
from benchmarks.text.acceptance import Total, macro, macro_drafted_share, macro_survival, total
from benchmarks.text.closed_loop import Answer, closed_loop
from benchmarks.text.conversations import Conversation, by_category, loops
from server.core import Request, SamplingParams
from server.engine.core import EngineCore
from server.text.chat_template import encode_chat

PROGRESS_S = 10.0


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
    drafted = " ".join(f"{share:.2f}" for share in macro_drafted_share(everything))
    note = (
        f"{cut}mean of {len(everything)} categories, {what}; accepted by position {shares} of the drafts there, "
        f"drafted in {drafted} of the steps"
    )
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
