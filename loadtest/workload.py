"""What is asked: sessions of turns, and how the client behaves while it reads the answers."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any


@dataclass(frozen=True, slots=True)
class Turn:
    """One request of a session.

    `messages` are added to the conversation so far; in a completion their contents are joined. `max_tokens` None
    leaves it to the server.
    `delay_s` passes between the answer before and this turn. `fields` are further fields of the body.
    """

    messages: tuple[dict[str, Any], ...]
    max_tokens: int | None = None
    delay_s: float = 0.0
    fields: dict[str, Any] = field(default_factory=dict)
    whole: bool = False
    """`messages` are the whole conversation, recorded answers included: nothing is put before them."""


@dataclass(frozen=True, slots=True)
class Session:
    """Turns that one user asks one after another. `at_s`: when the first was recorded, for a replay."""

    turns: tuple[Turn, ...]
    at_s: float | None = None


@dataclass(frozen=True, slots=True)
class Behaviour:
    """How one request's reader behaves.

    `cancel_after` closes the connection once so many tokens have come. `bytes_per_s` reads no faster than that.
    """

    cancel_after: int | None = None
    bytes_per_s: float | None = None


NORMAL = Behaviour()


def user(text: str) -> tuple[dict[str, Any], ...]:
    """A conversation's next message."""
    return ({"role": "user", "content": text},)
