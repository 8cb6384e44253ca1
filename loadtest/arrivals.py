"""When requests are meant to be sent: pure functions of settings and a seed.

Open loops decide every time beforehand, whatever the server does: latency counted from these times has no coordinated
omission (Tene, "How NOT to measure latency", 2013). A closed loop has users instead, each of whom waits for an answer.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator
from itertools import pairwise

import numpy as np

from loadtest.errors import invalid

PROCESSES = ("poisson", "constant", "gamma")
"""How the gaps between arrivals are distributed: exponential, all equal, gamma of shape `burstiness`."""

_CHUNK = 1024


def unit_times(process: str, burstiness: float, seed: int) -> Iterator[float]:
    """Arrival times at one a second, without end; the first gap is drawn like the others.

    `burstiness` is the gamma's shape, as in `vllm bench serve`: 1 is Poisson, below 1 is burstier (the squared
    coefficient of variation of the gaps is its inverse). Raises LoadTestError for an unknown process or a shape that
    is not positive.
    """
    if process not in PROCESSES:
        raise invalid("arrivals", process, f"one of {', '.join(PROCESSES)}")
    if not 0 < burstiness < math.inf:
        raise invalid("burstiness", burstiness, "a number above 0")
    random = np.random.default_rng([seed, 0xA221])
    now = 0.0
    while True:
        if process == "constant":
            gaps = np.ones(_CHUNK)
        else:
            shape = 1.0 if process == "poisson" else burstiness
            gaps = random.gamma(shape, 1 / shape, _CHUNK)
        for gap in gaps:
            now += float(gap)
            yield now


def at_rate(unit: float, rate: float, ramp_to: float, ramp_s: float) -> float:
    """The time at which `unit` arrivals are expected, for a rate that goes linearly to `ramp_to` within `ramp_s`.

    The inverse of the cumulative rate: it turns arrivals at one a second into those of any rate over time (Lewis and
    Shedler, "Simulation of nonhomogeneous Poisson processes", 1979).
    """
    if math.isinf(rate):
        return 0.0
    in_ramp = (rate + ramp_to) / 2 * ramp_s
    if unit >= in_ramp:
        return ramp_s + (unit - in_ramp) / ramp_to
    slope = (ramp_to - rate) / ramp_s
    return 2 * unit / (rate + math.sqrt(rate * rate + 2 * slope * unit))


def open_loop(
    rate: float,
    seed: int,
    *,
    process: str = "poisson",
    burstiness: float = 1.0,
    count: int | None = None,
    duration_s: float | None = None,
    ramp_to: float | None = None,
    ramp_s: float = 0.0,
) -> list[float]:
    """Seconds from the start, ascending: `count` of them, or those within `duration_s`, or whichever ends first.

    A rate of infinity sends all at once and needs a count. Raises LoadTestError.
    """
    if not rate > 0:
        raise invalid("rate", rate, "requests a second above 0, or inf")
    if ramp_to is not None and not 0 < ramp_to < math.inf:
        raise invalid("ramp_to", ramp_to, "requests a second above 0")
    if count is None and (duration_s is None or math.isinf(rate)):
        raise invalid("requests", count, "a number of requests, or a duration_s with a finite rate")
    times: list[float] = []
    for unit in unit_times(process, burstiness, seed):
        at = at_rate(unit, rate, rate if ramp_to is None else ramp_to, 0.0 if ramp_to is None else ramp_s)
        if (count is not None and len(times) == count) or (duration_s is not None and at >= duration_s):
            return times
        times.append(at)
    raise AssertionError("arrivals never end by themselves")


def replay(timestamps_s: Iterable[float], speed: float = 1.0) -> list[float]:
    """Recorded times, the first one at 0, `speed` times as fast. Raises LoadTestError for times that go back."""
    if not 0 < speed < math.inf:
        raise invalid("speed", speed, "a number above 0")
    times = list(timestamps_s)
    for before, after in pairwise(times):
        if not after >= before:
            raise invalid("timestamp", after, f"times that never go back (the one before is {before!r})")
    return [(at - times[0]) / speed for at in times]


def closed_loop(concurrency: int, ramp_s: float = 0.0) -> list[float]:
    """When each of `concurrency` users sends the first request; the next one goes when the answer before has ended."""
    if concurrency < 1:
        raise invalid("concurrency", concurrency, "1 or more")
    return [ramp_s * user / concurrency for user in range(concurrency)]
