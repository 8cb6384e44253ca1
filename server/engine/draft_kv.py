"""Which tokens of a sequence the drafter has keys and values of, as far as the host knows. Pure bookkeeping.

The device, or the drafter, does the same sums with what it knows, maybe a step ahead. The host's are there to mark
blocks: one whose tokens the drafter saw, all of them, serves it after a prefix hit as well.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Protocol


class DraftSpan(Protocol):
    """Keys and values of positions `first` … `end` - 1 are right. Calls are of steps whose results are known."""

    first: int
    end: int

    def chunk(self, start: int, end: int) -> None:
        """The drafter saw prompt tokens `start` … `end` - 1."""

    def step(self, known: int, num_emitted: int, drafted: bool) -> None:
        """The drafter saw a verify step of a row of `known` tokens, that emitted more; with drafts or without."""

    def holds(self, start: int, end: int) -> bool:
        """Whether a block of positions `start` … `end` - 1 serves another sequence, and what comes behind it."""


MakeSpan = Callable[[Sequence[bool], int], DraftSpan]
"""(whether each block of a prefix hit serves the drafter, block size) -> what the sequence begins with."""


_WINDOW = 2
"""WINDOW of `draft_models.small_lm_device`."""


@dataclass(slots=True)
class CausalSpan:
    """A language model's: they mean nothing without all that is before them, and it computes what it lacks itself.

    `unseen` is how many tokens the last step emitted, if it had no chain. Where steps are read one late the next chain
    catches up to before those and runs the last `_WINDOW` itself: the rest comes with the chain behind it.
    """

    first: int = 0
    end: int = 0
    unseen: int = 0

    @staticmethod
    def after_hit(serves: Sequence[bool], block_size: int) -> CausalSpan:
        """The blocks before the first that does not serve."""
        missing = (i for i, good in enumerate(serves) if not good)
        return CausalSpan(end=next(missing, len(serves)) * block_size)

    def chunk(self, start: int, end: int) -> None:
        """See DraftSpan."""
        if self.end >= start:
            self.end = max(self.end, end)

    def step(self, known: int, num_emitted: int, drafted: bool) -> None:
        """See DraftSpan. Before it drafts it catches up; of the last token it learns in the next step."""
        if drafted:
            self.end = max(self.end, known - self.unseen) if self.unseen > _WINDOW else known
        self.unseen = 0 if drafted else num_emitted

    def holds(self, start: int, end: int) -> bool:
        """See DraftSpan."""
        return end <= self.end


@dataclass(slots=True)
class FeatureSpan:
    """An EAGLE head's: each needs the target's features of the token before, which nobody computes again.

    A chain writes those of the last `width` tokens, as far as `features_first` … `features_end` - 1 are known.
    """

    width: int
    first: int = 0
    end: int = 0
    features_first: int = 0
    features_end: int = 1

    @staticmethod
    def after_hit(width: int, serves: Sequence[bool], block_size: int) -> FeatureSpan:
        """The blocks behind the last that does not serve."""
        end, missing = len(serves) * block_size, [i for i, good in enumerate(serves) if not good]
        first = (missing[-1] + 1) * block_size if missing else 0
        return FeatureSpan(width, first, end, end, end + 1 if first < end or end == 0 else 0)

    def chunk(self, start: int, end: int) -> None:
        """See DraftSpan. Where the token before was not seen, the first position is not right."""
        if self.features_end != start + 1:
            self.first = start + 1
        self.end = self.features_first = end
        self.features_end = end + 1

    def step(self, known: int, num_emitted: int, drafted: bool) -> None:
        """See DraftSpan."""
        if drafted:
            fresh = self.features_end == known
            right = max(known - self.width, self.features_first) if fresh else known
            if self.end < right:
                self.first = right
            self.end = known
        if self.features_end != known:
            self.features_first = known
        self.features_end = known + num_emitted

    def holds(self, start: int, end: int) -> bool:
        """See DraftSpan. What comes behind begins with the features of the block's last token."""
        behind = end < self.end or self.features_first <= end < self.features_end
        return self.first <= start and end <= self.end and behind


def span_maker(drafter: Any, max_draft_tokens: int) -> MakeSpan | None:
    """How `drafter` fares with blocks; None for drafters without keys and values (no `pools`)."""
    if not getattr(drafter, "pools", None):
        return None
    if not drafter.feature_layers:
        return CausalSpan.after_hit
    width = max_draft_tokens + 1
    return lambda serves, block_size: FeatureSpan.after_hit(width, serves, block_size)
