"""What one streamed answer said and what it took."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any


@dataclass(frozen=True, slots=True)
class Piece:
    """Text that belongs together: an accepted draft, or what the target sampled."""

    text: str
    accepted: bool = False


@dataclass(slots=True)
class Answer:
    """Filled while it streams. Times are seconds since the request was sent, None before there was any text.

    Token and draft counts are the server's own (`usage`), None until it sent them.
    """

    parts: list[str] = field(default_factory=list)
    first_s: float | None = None
    last_s: float | None = None
    num_tokens: int | None = None
    num_accepted: int | None = None
    num_rejected: int | None = None
    finish_reason: str | None = None

    @property
    def text(self) -> str:
        return "".join(self.parts)

    @property
    def tokens_per_s(self) -> float | None:
        """How fast tokens came after the first one; None where there was no second."""
        if self.num_tokens is None or self.first_s is None or self.last_s is None:
            return None
        seconds = self.last_s - self.first_s
        return (self.num_tokens - 1) / seconds if self.num_tokens > 1 and seconds > 0 else None

    def summary(self) -> str:
        """One line: tokens, tokens a second, time to first token, accepted drafts; what is unknown is left out."""
        said = []
        if self.num_tokens is not None:
            said.append(f"{self.num_tokens} token{'' if self.num_tokens == 1 else 's'}")
        if self.tokens_per_s is not None:
            said.append(f"{self.tokens_per_s:.1f} tokens/s")
        if self.first_s is not None:
            said.append(f"first after {self.first_s:.2f} s")
        if self.num_accepted is not None and self.num_rejected is not None:
            said.append(f"{self.num_accepted} of {self.num_accepted + self.num_rejected} drafts accepted")
        if self.finish_reason == "length":
            said.append("cut off at the longest length")
        return ", ".join(said)


def receive(
    chunks: Iterator[dict[str, Any]], answer: Answer, clock: Callable[[], float] = time.monotonic
) -> Iterator[Piece]:
    """The answer's text as it comes; `answer` is filled on the way. The clock starts with the first `next`."""
    start = clock()
    for chunk in chunks:
        _count(answer, chunk.get("usage"))
        for choice in chunk.get("choices") or ():
            answer.finish_reason = choice.get("finish_reason") or answer.finish_reason
            text = (choice.get("delta") or {}).get("content") or ""
            if not text:
                continue
            answer.last_s = clock() - start
            if answer.first_s is None:
                answer.first_s = answer.last_s
            answer.parts.append(text)
            yield from _pieces(text, choice.get("draft_annotations"))


def _pieces(text: str, annotations: list[dict[str, Any]] | None) -> Iterator[Piece]:
    """A server that does not know which tokens were drafted sends no annotations."""
    pieces = [Piece(str(a.get("text")), a.get("accepted") is True) for a in annotations or ()]
    if "".join(piece.text for piece in pieces) == text:
        yield from pieces
    else:
        yield Piece(text)


def _count(answer: Answer, usage: dict[str, Any] | None) -> None:
    if usage is None:
        return
    answer.num_tokens = usage.get("completion_tokens")
    details = usage.get("completion_tokens_details") or {}
    answer.num_accepted = details.get("accepted_prediction_tokens")
    answer.num_rejected = details.get("rejected_prediction_tokens")
