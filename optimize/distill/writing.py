"""One document while the target writes it: what is asked next, and what of the answer is kept."""

from __future__ import annotations

import random
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from optimize.distill.filters import has_extreme_ratio, is_loop
from optimize.distill.prompts import PASSAGE_TASKS, TEXT_OPENINGS, USER_OPENINGS, Prompts
from optimize.distill.shards import ANSWER, CONTINUATION, TEMPLATE, USER, Document
from server.core import Request, SamplingParams

if TYPE_CHECKING:
    from optimize.distill.corpus import CorpusSettings

MIN_WRITTEN = 8
"""Shorter answers and texts are dropped."""
MIN_ROOM = 32
"""A turn is not begun with less room than this."""


@dataclass(frozen=True, slots=True)
class Plan:
    """What a document is to be. `turns` 0: a plain text that begins with `opening`.

    `passage`: the first request is about a text that begins with `opening`, with what stands around it (see
    PASSAGE_TASKS).
    """

    turns: int
    opening: str
    passage: tuple[str, str, bool] | None
    temperature: float
    user_temperature: float
    seed: int


def plan(settings: CorpusSettings, index: int, has_template: bool) -> Plan:
    """The plan of document `index`: a pure function of the settings."""
    rng = random.Random(f"{settings.seed}/{index}")
    chat = rng.random() < settings.chat_share and has_template
    turns = 1 + rng.choices(range(len(settings.turn_shares)), settings.turn_shares)[0] if chat else 0
    passage = rng.choice(PASSAGE_TASKS) if rng.random() < settings.passage_share and chat else None
    plain = not chat or passage is not None
    opened = rng.random() < settings.opening_share or passage is not None
    opening = rng.choice(TEXT_OPENINGS if plain else USER_OPENINGS) if opened else ""
    greedy = rng.random() < settings.greedy_share
    temperature = 0.0 if greedy else rng.uniform(*settings.temperatures)
    if not chat and greedy:  # plain texts without a temperature are few and all alike
        temperature = settings.temperatures[0]
    return Plan(turns, opening, passage, temperature, rng.uniform(*settings.user_temperatures), rng.getrandbits(63))


class Writing:
    """The state of one document. `next_request` and `take` alternate until the former is None."""

    def __init__(self, index: int, settings: CorpusSettings, prompts: Prompts) -> None:
        self.index, self.settings, self.prompts = index, settings, prompts
        self.plan = plan(settings, index, prompts.template is not None)
        self._ends = prompts.end_ids()
        self._ids: list[int] = []
        self._kinds: list[int] = []
        self._turn = 0
        self._asking = True
        self._reading = self.plan.passage is not None
        self._kept = 0  # length up to the last answer that is good
        self._done = False

    def next_request(self) -> Request | None:
        """What the target is to go on with, None if the document is finished."""
        s = self.settings
        if self._done:
            return None
        if self.plan.turns == 0:
            self._give(self.prompts.beginning(self.plan.opening), TEMPLATE)
            return self._request(s.max_continuation, self.plan.temperature, 1.0)
        if self._reading:  # the passage is written apart, as the plain text it is
            beginning = self.prompts.beginning(self.plan.opening)
            return self._request(s.max_passage, self.plan.user_temperature, s.user_top_p, beginning)
        if self._turn == self.plan.turns:
            return None
        before, between = self.prompts.pieces(self._turn)
        about_passage = self._turn == 0 and self.plan.passage is not None
        if not (self._asking and about_passage):
            self._join(before if self._asking else between)
        if not self._asking:
            return self._request(s.max_answer, self.plan.temperature, 1.0)
        if self._turn == 0 and not about_passage:
            self._give(self.prompts.words(self.plan.opening), TEMPLATE)
        return self._request(s.max_user, self.plan.user_temperature, s.user_top_p)

    def take(self, token_ids: list[int]) -> None:
        """The answer to the last request."""
        if self.plan.turns == 0:
            self._give(token_ids, CONTINUATION)
            self._done = True
            if self._is_good(token_ids):
                self._kept = len(self._ids)
            return
        if self._reading:
            self._read(self._without_end(token_ids))
            return
        asked, self._asking = self._asking, not self._asking
        self._give(token_ids, USER if asked else ANSWER)
        words = self._without_end(token_ids)
        if asked:
            self._done = not self._is_question(words)
            return
        if not self._is_good(words):
            self._done = True
            return
        self._kept = len(self._ids)
        self._turn += 1
        self._done = len(words) == len(token_ids)  # cut off: nothing can follow

    def document(self) -> Document | None:
        """What is worth keeping of it, if anything."""
        if not self._kept:
            return None
        ids, kinds = self._ids[: self._kept], self._kinds[: self._kept]
        return Document(np.array(ids, dtype=np.int32), np.array(kinds, dtype=np.uint8), self.plan.temperature)

    def _read(self, words: list[int]) -> None:
        """Puts the passage into the first request; if that is all of it, the answer comes next."""
        assert self.plan.passage is not None
        before, after, goes_on = self.plan.passage
        self._reading = False
        if not self._is_good(words):
            self._done = True
            return
        text = self.prompts.tokenizer.decode(words).strip()
        self._join(self.prompts.pieces(0)[0])
        self._give(self.prompts.words(f"{before}{self.plan.opening}{text}{after}"), TEMPLATE)
        self._asking = goes_on

    def _request(
        self, max_tokens: int, temperature: float, top_p: float, prompt: list[int] | None = None
    ) -> Request | None:
        prompt = list(self._ids) if prompt is None else prompt
        room = self.settings.max_length - len(prompt)
        if room < MIN_ROOM or not prompt:
            return None
        sampling = SamplingParams(temperature=temperature, top_p=top_p, seed=self.plan.seed)
        return Request(
            str(self.index),
            prompt,
            sampling,
            max_tokens=min(max_tokens, room),
            stop_token_ids=sorted(self._ends),
        )

    def _join(self, piece: list[int]) -> None:
        """Appends the template's text; its first token may be the end of the turn that the target wrote itself."""
        written = self._ids and self._ids[-1] in self._ends
        self._give(piece[1:] if written and piece and piece[0] == self._ids[-1] else piece, TEMPLATE)

    def _give(self, token_ids: list[int], kind: int) -> None:
        self._ids += token_ids
        self._kinds += [kind] * len(token_ids)

    def _without_end(self, token_ids: list[int]) -> list[int]:
        return token_ids[:-1] if token_ids and token_ids[-1] in self._ends else token_ids

    def _is_question(self, words: list[int]) -> bool:
        """Whether there is something to answer: words, no loop, no token that only a template may write."""
        special = self.prompts.tokenizer.special_ids
        text = self.prompts.tokenizer.decode(words)
        return len(text.split()) >= 2 and special.isdisjoint(words) and not is_loop(words)

    def _is_good(self, words: list[int]) -> bool:
        if len(words) < MIN_WRITTEN or is_loop(words):
            return False
        return not has_extreme_ratio(self.prompts.tokenizer.decode(words))
