"""Tokens by verify step and acceptance by position, summed over answers."""

from __future__ import annotations

import statistics
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

from benchmarks.text.closed_loop import Answer


@dataclass
class Total:
    """Sums over answers. By draft position: how often something was drafted there, how often all before it was
    accepted then, and how often it was itself. A step counts once for each row."""

    answers: int = 0
    emitted: int = 0
    steps: int = 0
    drafted: list[int] = field(default_factory=list)
    reached: list[int] = field(default_factory=list)
    accepted: list[int] = field(default_factory=list)

    def add(self, answer: Answer) -> None:
        """The prompt's own token apart, which no verify step emitted."""
        self.answers += 1
        self.emitted += len(answer.tokens) - 1
        self.steps += len(answer.verdicts)
        for drafted, accepted in answer.verdicts:
            self._widen(drafted)
            for position in range(drafted):
                self.drafted[position] += 1
                self.reached[position] += accepted >= position
                self.accepted[position] += accepted > position

    def _widen(self, width: int) -> None:
        for counts in (self.drafted, self.reached, self.accepted):
            counts += [0] * (width - len(counts))

    @property
    def emitted_per_step(self) -> float:
        return self.emitted / self.steps

    def survival(self) -> list[float]:
        """Share of the drafts at each position that were accepted."""
        return [a / d for a, d in zip(self.accepted, self.drafted, strict=True)]

    def drafted_share(self) -> list[float]:
        """Share of the verify steps in which something was drafted at each position."""
        return [d / self.steps for d in self.drafted]

    def as_json(self) -> dict[str, Any]:
        return {
            "answers": self.answers,
            "emitted": self.emitted,
            "steps": self.steps,
            "emitted_per_step": round(self.emitted_per_step, 4) if self.steps else None,
            "drafted": self.drafted,
            "reached": self.reached,
            "accepted": self.accepted,
        }


def total(answers: Iterable[Answer]) -> Total:
    result = Total()
    for answer in answers:
        result.add(answer)
    return result


def macro(totals: Mapping[str, Total]) -> float:
    """Mean over the categories that took any verify step."""
    return statistics.mean(t.emitted_per_step for t in totals.values() if t.steps)


def macro_survival(totals: Mapping[str, Total]) -> list[float]:
    """Share of accepted drafts by position, mean over the categories that drafted there."""
    return _macro([t.survival() for t in totals.values()])


def macro_drafted_share(totals: Mapping[str, Total]) -> list[float]:
    """Share of verify steps in which something was drafted, by position, mean over the categories that took any; where
    a category drafted nothing it counts as 0. A copying drafter's accepted share is of few steps.
    """
    each = [t.drafted_share() for t in totals.values() if t.steps]
    width = max(map(len, each), default=0)
    return _macro([[*s, *[0.0] * (width - len(s))] for s in each])


def _macro(each: list[list[float]]) -> list[float]:
    width = max(map(len, each), default=0)
    return [statistics.mean(s[j] for s in each if j < len(s)) for j in range(width)]


def table(totals: Mapping[str, Total]) -> str:
    """A line a category: answers, emitted per step, at each position accepted share of the drafts and drafted share of
    the steps."""
    lines = []
    for category, t in totals.items():
        if t.steps:
            pairs = zip(t.survival(), t.drafted_share(), strict=True)
            shares = " ".join(f"{share:5.2f} of {drafted:4.2f}" for share, drafted in pairs)
            lines.append(f"{category:16} {t.answers:4} answers {t.emitted_per_step:6.3f} a step | {shares}")
    return "\n".join(lines)
