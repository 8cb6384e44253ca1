"""One document while the target writes it: what is asked next, and what of the answer is kept."""

from __future__ import annotations

import random
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from optimize.distill.filters import has_extreme_ratio, is_loop
from optimize.distill.prompts import TEXT_OPENINGS, USER_OPENINGS, Prompts
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
    """What a document is to be. `turns` 0: a plain text that begins with `opening`."""

    turns: int
    opening: str
    temperature: float
    user_temperature: float
    seed: int


def plan(settings: CorpusSettings, index: int, has_template: bool) -> Plan:
    """The plan of document `index`: a pure function of the settings."""
    rng = random.Random(f"{settings.seed}/{index}")
    chat = rng.random() < settings.chat_share and has_template
    turns = 1 + rng.choices(range(len(settings.turn_shares)), settings.turn_shares)[0] if chat else 0
    opened = rng.random() < settings.opening_share
    opening = rng.choice(USER_OPENINGS if chat else TEXT_OPENINGS) if opened else ""
    greedy = rng.random() < settings.greedy_share
    temperature = 0.0 if greedy else rng.uniform(*settings.temperatures)
    if not chat and greedy:  # plain texts without a temperature are few and all alike
        temperature = settings.temperatures[0]
    return Plan(turns, opening, temperature, rng.uniform(*settings.user_temperatures), rng.getrandbits(63))


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
        if self._turn == self.plan.turns:
            return None
        before, between = self.prompts.pieces(self._turn)
        self._join(before if self._asking else between)
        if not self._asking:
            return self._request(s.max_answer, self.plan.temperature, 1.0)
        if self._turn == 0:
            self._give(self.prompts.words(self.plan.opening), USER)
        return self._request(s.max_user, self.plan.user_temperature, s.user_top_p)

    def take(self, token_ids: list[int]) -> None:
        """The answer to the last request."""
        if self.plan.turns == 0:
            self._give(token_ids, CONTINUATION)
            self._done = True
            if self._is_good(token_ids):
                self._kept = len(self._ids)
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

    def _request(self, max_tokens: int, temperature: float, top_p: float) -> Request | None:
        room = self.settings.max_length - len(self._ids)
        if room < MIN_ROOM or not self._ids:
            return None
        sampling = SamplingParams(temperature=temperature, top_p=top_p, seed=self.plan.seed)
        return Request(
            str(self.index),
            list(self._ids),
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
