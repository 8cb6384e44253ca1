"""What the client saw of one request."""

from __future__ import annotations

from dataclasses import dataclass, field

OK, CANCELLED = "ok", "cancelled"
"""Ways to end that are no error; every other `end` is a kind of error."""


@dataclass(slots=True)
class Record:
    """Times are seconds since the run began, on one monotonic clock for all processes.

    `times[i]` is when `tokens[i]` new tokens arrived together; events of one read are one arrival. `output_tokens` is
    what the server's usage says, or the sum of `tokens`. `slow` readers held themselves up: their latency is not the
    server's.
    """

    intended: float
    sent: float = 0.0
    ended: float = 0.0
    times: list[float] = field(default_factory=list)
    tokens: list[int] = field(default_factory=list)
    end: str = OK
    message: str = ""
    input_tokens: int = 0
    output_tokens: int = 0
    cached_tokens: int = 0
    slow: bool = False
    session: int = 0
    turn: int = 0

    @property
    def failed(self) -> bool:
        """Whether it ended in an error."""
        return self.end not in (OK, CANCELLED)
