"""From what was measured and what is asked to yes or no. No torch."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from optimize.evaluate.drafter import Drafting
from optimize.evaluate.quality import Quality
from optimize.evaluate.speed import TierSpeed
from optimize.recipe import GateThresholds


@dataclass(frozen=True, slots=True)
class Number:
    """One of the numbers that decide. `bound` is the unfavourable end of `value`'s interval where it has one: then the
    bound is what has to be at most (`better` "lower") or at least ("higher") the threshold. None: was not measured.
    """

    name: str
    value: float | None
    bound: float | None
    threshold: float
    better: Literal["lower", "higher"]
    strict: bool = False
    note: str = ""

    @property
    def passed(self) -> bool:
        """What was not measured has not passed, and neither has what is not a number."""
        decides = self.value if self.bound is None else self.bound
        if decides is None or math.isnan(decides):
            return False
        if self.strict and decides == self.threshold:
            return False
        return decides <= self.threshold if self.better == "lower" else decides >= self.threshold

    @property
    def reason(self) -> str:
        """What it is, in words: `perplexity ratio 1.204 (at worst 1.221) is over 1.03`."""
        if self.value is None:
            return f"{self.name} was not measured"
        at_worst = "" if self.bound is None else f" (at worst {_shown(self.bound)})"
        over, under = ("is not under", "is not over") if self.strict else ("is over", "is under")
        relation = over if self.better == "lower" else under
        if self.passed:
            relation = "is within" if not self.strict else "is under" if self.better == "lower" else "is over"
        note = f", {self.note}" if self.note else ""
        return f"{self.name} {_shown(self.value)}{at_worst} {relation} {_shown(self.threshold)}{note}"


@dataclass(frozen=True, slots=True)
class Verdict:
    """Every number that had a say, and what to try next if one said no."""

    numbers: tuple[Number, ...]
    advice: tuple[str, ...] = ()

    @property
    def passed(self) -> bool:
        """Whether the candidate may take the original's place."""
        return all(number.passed for number in self.numbers)

    @property
    def failed(self) -> tuple[Number, ...]:
        """Numbers that said no."""
        return tuple(number for number in self.numbers if not number.passed)

    @property
    def reasons(self) -> list[str]:
        """Why not, and what to try."""
        return [*(number.reason for number in self.failed), *self.advice]


def judged(
    quality: Quality | None, speeds: Sequence[TierSpeed], drafting: Drafting | None, thresholds: GateThresholds
) -> tuple[Number, ...]:
    """The numbers, each beside its threshold. A drafter counts where there is one."""
    numbers = [*_quality(quality, thresholds)]
    timed = {tier.batch: tier for tier in speeds}
    for batch in thresholds.faster_at:
        tier = timed.get(batch)
        value = None if tier is None else tier.ratio.median
        note = "" if tier is None else f"{tier.candidate_ms.median:.3g} ms a step and {tier.base_ms.median:.3g} ms"
        numbers.append(Number(f"step time ratio at batch {batch}", value, None, 1.0, "lower", strict=True, note=note))
    if drafting is not None:
        note = f"{drafting.candidate.acceptance_rate:.3f} of drafts accepted and {drafting.base.acceptance_rate:.3f}"
        limit = thresholds.min_acceptance_ratio
        numbers.append(Number("acceptance ratio", drafting.ratio, None, limit, "higher", note=note))
    return tuple(numbers)


def _quality(quality: Quality | None, thresholds: GateThresholds) -> list[Number]:
    tokens = broken = None
    ratio = worst_ratio = agreement = worst_agreement = None
    if quality is not None:
        tokens, broken = float(quality.num_tokens), float(quality.num_broken)
        ratio, worst_ratio = quality.perplexity_ratio.mean, quality.perplexity_ratio.high
        agreement, worst_agreement = quality.top1_agreement.mean, quality.top1_agreement.low
    return [
        Number("tokens of text", tokens, None, thresholds.min_tokens, "higher"),
        Number("positions with broken logits", broken, None, 0.0, "lower"),
        Number("perplexity ratio", ratio, worst_ratio, thresholds.max_perplexity_ratio, "lower"),
        Number("top-1 agreement", agreement, worst_agreement, thresholds.min_top1_agreement, "higher"),
    ]


def _shown(value: float) -> str:
    """Whole numbers whole, shares to four places."""
    if not math.isfinite(value):
        return str(value)
    return f"{value:,.0f}" if abs(value) >= 1000 or value == int(value) else f"{value:.4f}".rstrip("0").rstrip(".")
