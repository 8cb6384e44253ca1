"""Two answers to one request: where they part, by how much, and whether that may be."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from server.core import TokenLogprobs

PROMISES = ("exact", "close", "none")
"""`exact`: both engines compute the same bits, so every difference is a bug. `close`: the same numbers up to rounding,
so tokens may differ where the model had them nearly equal. `none`: other models, which may say anything."""

SAME, DIFFERENT, TIE, UNEXPLAINED, ALARM = VERDICTS = ("same", "different", "tie", "unexplained", "alarm")
"""`different`: nothing was promised. `tie`: explained by rounding. `unexplained`: nothing was there to judge it by."""

_LEAST = 1e-12
"""Probability of what is left where rounding leaves nothing."""


@dataclass(frozen=True, slots=True)
class Answer:
    """`tokens` as the engine emitted them, end-of-sequence included. `tpot_s` is the mean time per token after the
    first (None: there is none). `whole`: the engine ended it; else it was cut off after these tokens, by a stop string.
    """

    tokens: Sequence[int]
    tpot_s: float | None = None
    whole: bool = True


@dataclass(frozen=True, slots=True)
class Scores:
    """What one engine gives the next token after what both answers share, computed from the tokens alone, without
    drafts: log-probabilities of its most probable tokens."""

    top: dict[int, float]

    @staticmethod
    def of(found: TokenLogprobs) -> Scores:
        return Scores(dict(zip(found.top_ids, found.top_logprobs, strict=True)))

    def gap(self, *tokens: int | None) -> float:
        """How much less probable than the best the least probable of `tokens` is, in nats; infinite for one that is not
        among the most probable, or where an answer had already ended."""
        best = max(self.top.values(), default=-math.inf)
        return max(best - self.top.get(-1 if token is None else token, -math.inf) for token in tokens)


@dataclass(frozen=True, slots=True)
class Comparison:
    """An answer of arm `of` and its copy's of arm `arm`; for an audit the two are one.

    `position` is the first token that differs (None: none does), counted from 0, `token` and `copy_token` what was
    there (None: the answer had ended). `gap` is `Scores.gap` of the two, the larger one of the two engines'.
    `kl` is `divergence` of the answer's engine's distribution there and the copy's engine's (None for audits: they have
    one engine). `length_shift` are the copy's tokens less the answer's (None for one that was cut off), `tpot_ratio`
    its time per token over the answer's, waiting for users included. `at_s` is Unix time.
    """

    kind: str
    of: str
    arm: str
    request_id: str
    at_s: float
    verdict: str
    reason: str = ""
    num_tokens: int = 0
    num_prompt_tokens: int = 0
    position: int | None = None
    token: int | None = None
    copy_token: int | None = None
    gap: float | None = None
    kl: float | None = None
    length_shift: int | None = None
    tpot_ratio: float | None = None


@dataclass(frozen=True, slots=True)
class Dropped:
    """A copy that there was no room for, or that did not come to its end."""

    kind: str
    of: str
    arm: str
    reason: str


DROP_REASONS = ("busy", "not_ready", "timeout", "failed")


def first_divergence(answer: Answer, copy: Answer) -> int | None:
    """Position of the first token that differs; of an answer that was cut off, only what there is of it counts."""
    for position, (one, other) in enumerate(zip(answer.tokens, copy.tokens, strict=False)):
        if one != other:
            return position
    if len(copy.tokens) < len(answer.tokens) or (answer.whole and len(copy.tokens) > len(answer.tokens)):
        return min(len(answer.tokens), len(copy.tokens))
    return None


def token_at(answer: Answer, position: int) -> int | None:
    """None where the answer had ended."""
    return answer.tokens[position] if position < len(answer.tokens) else None


def divergence(p: Scores, q: Scores) -> float:
    """A lower bound in nats of KL(p || q) over the whole vocabulary, from the tokens that each lists.

    Outcomes are put together as far as they are not known one by one, which never makes the divergence larger (the
    data-processing inequality): the tokens that both list, those that only q lists, and all others. What p gives the
    second of these is not known but at most what p's list leaves over: the value that makes the sum least is taken.
    """
    shared = p.top.keys() & q.top.keys()
    known = sum(_part(math.exp(p.top[token]), math.exp(q.top[token])) for token in shared)
    left = max(0.0, 1 - sum(math.exp(p.top[token]) for token in shared))
    unlisted = max(0.0, 1 - sum(map(math.exp, p.top.values())))
    theirs = sum(math.exp(value) for token, value in q.top.items() if token not in shared)
    others = max(0.0, 1 - sum(map(math.exp, q.top.values())))
    taken = min(left * theirs / max(theirs + others, _LEAST), unlisted)
    return max(0.0, known + _part(taken, theirs) + _part(left - taken, others))


def _part(a: float, b: float) -> float:
    return a * math.log(a / max(b, _LEAST)) if a > 0 else 0.0


def judged(
    promise: str, tokens: tuple[int | None, int | None], scores: Sequence[Scores], tolerance: float, *, scored: bool
) -> tuple[str, str]:
    """(verdict, reason) of two answers that differ. `scored`: the highest score wins (`scored_by_model`), so that
    `scores` of the engines concerned can explain it; there may be none."""
    if promise == "none":
        return DIFFERENT, "the arms' models differ"
    if promise == "exact":
        return ALARM, "the engines compute the same bits, and their tokens differ"
    if not scored:
        return UNEXPLAINED, "it is sampled or penalised: log-probabilities alone do not say how close the tokens were"
    if not scores:
        return UNEXPLAINED, "it could not be scored again"
    gap = max(one.gap(*tokens) for one in scores)
    if gap <= tolerance:
        return TIE, f"floating-point tie: {gap:.3g} nats apart, {tolerance:g} are tolerated"
    apart = "more than the most probable tokens tell" if math.isinf(gap) else f"{gap:.3g} nats"
    return ALARM, f"no tie: the tokens are {apart} apart, {tolerance:g} are tolerated"
