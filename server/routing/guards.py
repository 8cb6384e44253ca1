"""Guard rails: what is never waited for."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np

from server.routing.evidence.observation import Observation
from server.routing.plan import Guards

GUARDS = ("engine restarts", "error rate", "ttft_p99_ms", "tpot_p99_ms")
"""What a violation begins with."""


@dataclass(frozen=True, slots=True)
class Window:
    """What one arm did lately: requests, errors among them, and P99s (ms) over those without error; None: none."""

    num_requests: int = 0
    num_errors: int = 0
    ttft_p99_ms: float | None = None
    tpot_p99_ms: float | None = None

    @property
    def error_rate(self) -> float:
        """Errors a request."""
        return self.num_errors / self.num_requests if self.num_requests else 0.0


class RecentRequests:
    """The requests of one arm that ended in the last `window_s` seconds."""

    def __init__(self, window_s: float) -> None:
        self.window_s = window_s
        self._recent: deque[tuple[float, bool, float | None, float | None]] = deque()

    def add(self, seen: Iterable[Observation]) -> None:
        """Notes requests in the order in which they ended."""
        self._recent.extend((one.finished_s, one.error, one.ttft_ms, one.tpot_ms) for one in seen)

    def window(self, now_s: float) -> Window:
        """What they say at `now_s`; older ones are forgotten."""
        while self._recent and self._recent[0][0] < now_s - self.window_s:
            self._recent.popleft()
        errors = sum(failed for _, failed, _, _ in self._recent)
        ttft = [ttft for _, failed, ttft, _ in self._recent if not failed and ttft is not None]
        tpot = [tpot for _, failed, _, tpot in self._recent if not failed and tpot is not None]
        return Window(len(self._recent), errors, _p99(ttft), _p99(tpot))


def _p99(values: list[float]) -> float | None:
    return float(np.quantile(values, 0.99, method="higher")) if values else None


def violation(guards: Guards, candidate: Window, baseline: Window, restarts: int) -> str | None:
    """The guard that the candidate violates, in words; None if none. `restarts`: of its engine, in the experiment."""
    if restarts > guards.max_restarts:
        return f"engine restarts: {restarts}, at most {guards.max_restarts} are let pass"
    rate = candidate.error_rate
    limit = max(guards.error_rate, guards.error_factor * baseline.error_rate)
    if candidate.num_errors >= guards.min_errors and rate >= limit:
        return (
            f"error rate: {candidate.num_errors} of {candidate.num_requests} requests in {guards.window_s:g} s, "
            f"the baseline's {baseline.num_errors} of {baseline.num_requests}"
        )
    if min(candidate.num_requests, baseline.num_requests) < guards.min_samples:
        return None
    for name, factor in (("ttft_p99_ms", guards.ttft_p99_factor), ("tpot_p99_ms", guards.tpot_p99_factor)):
        ours, theirs = getattr(candidate, name), getattr(baseline, name)
        if ours is not None and theirs is not None and ours > factor * theirs:
            return f"{name}: {ours:.0f}, more than {factor:g} times the baseline's {theirs:.0f}"
    return None
