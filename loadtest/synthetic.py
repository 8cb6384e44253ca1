"""Made-up prompts of wanted lengths, with shared prefixes and conversations of several turns."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np

from loadtest.distribution import ONE, ZERO, Distribution
from loadtest.workload import Session, Turn, user

_WORDS = (
    "time year people way day man thing woman life child world school state family student group country problem "
    "hand part place case week company system program question work government number night point home water room "
    "mother area money story fact month lot right study book eye job word business issue side kind head house "
    "service friend father power hour game line end member law car city community name president team minute idea "
    "body information back parent face others level office door health person art war history party result change "
    "morning reason research girl guy moment air teacher force education"
)
WORDS = tuple(_WORDS.split())
"""Common enough to be one token each in most vocabularies, with the space before."""


@dataclass(frozen=True, slots=True)
class Lengths:
    """What synthetic sessions look like. Tokens are turned into words by a Scale; `prefix` counts towards `input`."""

    input: Distribution
    output: Distribution
    prefix: int = 0
    num_prefixes: int = 1
    turns: Distribution = ONE
    think_s: Distribution = ZERO


@dataclass(frozen=True, slots=True)
class Scale:
    """A prompt of w words has `fixed + per_word * w` tokens: what a chat template adds, and how words are cut."""

    per_word: float = 1.0
    fixed: float = 0.0

    def words(self, tokens: int) -> int:
        """How many words make a prompt of so many tokens, at least one."""
        return max(1, round((tokens - self.fixed) / self.per_word))


def text(num_words: int, random: np.random.Generator) -> str:
    """So many words, which nobody is likely to have sent before."""
    return " ".join(WORDS[i] for i in random.integers(0, len(WORDS), num_words))


def sessions(lengths: Lengths, scale: Scale, seed: int) -> Iterator[Session]:
    """Without end. Session i is the same for the same seed, whatever was drawn before it."""
    prefixes = [text(lengths.prefix, np.random.default_rng([seed, 1, i])) for i in range(lengths.num_prefixes)]
    index = 0
    while True:
        random = np.random.default_rng([seed, 2, index])
        head = prefixes[int(random.integers(len(prefixes)))] + " " if lengths.prefix else ""
        turns = []
        for number in range(lengths.turns.draw_int(random)):
            words = scale.words(lengths.input.draw_int(random))
            own = max(1, words - lengths.prefix) if number == 0 else words
            content = (head if number == 0 else "") + text(own, random)
            delay = lengths.think_s.draw(random) if number else 0.0
            turns.append(Turn(user(content), lengths.output.draw_int(random), delay))
        yield Session(tuple(turns))
        index += 1
