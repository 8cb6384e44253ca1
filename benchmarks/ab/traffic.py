"""Requests of two arms, simulated: sticky keys, bursts, queues, noise that lasts.

What makes requests of one arm alike, and so an A/B test too sure of itself, is all here:

- keys (users) differ for good in prompt length, output length and how much they ask (log-normal), so that an arm's
  keys are a sample of their own; a key's requests follow each other with autocorrelation (AR(1));
- arrivals are a Poisson process whose rate triples in bursts that both arms share;
- each arm is a queue of its own: work that arrives beyond its capacity waits, and the more run, the slower each is;
- each machine has a speed of its own that wanders (Ornstein-Uhlenbeck, 15 s), and incidents of errors (5 s, once in
  ten minutes) that hit whoever is there.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np
import numpy.typing as npt

Floats = npt.NDArray[np.float64]
Ints = npt.NDArray[np.int64]


@dataclass(frozen=True)
class Effect:
    """What is wrong, or right, with a candidate: factor on its times, further errors and garbled answers."""

    slowdown: float = 1.0
    tail_slowdown: float = 1.0  # factor on the times of one request in `tail_share`
    tail_share: float = 0.0
    errors: float = 0.0
    garbled: float = 0.0


@dataclass(frozen=True)
class Load:
    """`rate`: requests a second of the whole server. `num_keys` 0: every request is a key of its own."""

    rate: float
    num_keys: int
    utilisation: float = 0.6  # of an arm that has half of the traffic, outside bursts


@dataclass(frozen=True)
class Requests:
    """Requests of one arm by the time they end. `values` in the order of evidence.columns.VALUES."""

    keys: Ints
    finished: Floats
    running: Ints
    values: Floats
    error: npt.NDArray[np.bool_]
    garbled: npt.NDArray[np.bool_]


@dataclass(frozen=True)
class Population:
    """The keys and the bursts of one experiment, which both arms share. `place` [K] in 0 … 1 is what assigns a key."""

    rng: np.random.Generator
    load: Load
    place: Floats = field(init=False)
    activity: Floats = field(init=False)
    length: Floats = field(init=False)
    prompt: Floats = field(init=False)
    style: Floats = field(init=False)
    flagged: Floats = field(init=False)

    def __post_init__(self) -> None:
        keys = self.load.num_keys
        rng = self.rng
        for name, value in (
            ("place", rng.random(keys)),
            ("activity", rng.lognormal(0.0, 1.0, keys)),
            ("length", rng.normal(0.0, 0.5, keys)),
            ("prompt", rng.normal(0.0, 0.3, keys)),
            ("style", rng.normal(0.0, 0.1, keys)),
            ("flagged", np.where(rng.random(keys) < 0.05, 0.1, 0.001)),
        ):
            object.__setattr__(self, name, value)

    def members(self, share: float, *, candidate: bool) -> Ints:
        """Keys of an arm with `share` of the traffic: those of a smaller share stay as it grows."""
        return np.flatnonzero(self.place < share if candidate else self.place >= 1 - share)


def burst_rate(rng: np.random.Generator, seconds: int) -> Floats:
    """[seconds] factor on the arrival rate, mean about 1: bursts of 20 s with three times the rate, 100 s between."""
    factor = np.full(seconds, 0.75)
    at = rng.exponential(100.0)
    while at < seconds:
        length = rng.exponential(20.0)
        factor[int(at) : int(at + length) + 1] = 2.25
        at += length + rng.exponential(100.0)
    return factor


def arm_requests(
    people: Population, bursts: Floats, start_s: float, share: float, effect: Effect, *, candidate: bool
) -> Requests:
    """What an arm with `share` of the traffic does from `start_s` until the bursts end."""
    rng, load = people.rng, people.load
    seconds = len(bursts)
    members = people.members(share, candidate=candidate)
    part = people.activity[members].sum() / people.activity.sum() if load.num_keys else share
    counts = rng.poisson(load.rate * part * bursts)
    total = int(counts.sum())
    second = np.repeat(np.arange(seconds), counts)
    arrival = second + rng.random(total)
    arrival.sort()
    who = _who(people, members, total, candidate=candidate, start_s=start_s)
    noise = _lasting(rng, who, total)
    known = who if load.num_keys else np.zeros(0, np.int64)
    length = people.length[known] if load.num_keys else rng.normal(0, 0.5, total)
    prompt = people.prompt[known] if load.num_keys else rng.normal(0, 0.3, total)
    style = people.style[known] if load.num_keys else rng.normal(0, 0.1, total)
    flagged = people.flagged[known] if load.num_keys else np.where(rng.random(total) < 0.05, 0.1, 0.001)
    tokens = np.maximum(1, np.round(np.exp(4.8 + length + 0.5 * noise + rng.normal(0, 0.4, total))))
    slow = np.where(rng.random(total) < effect.tail_share, effect.tail_slowdown, 1.0) * effect.slowdown
    speed = np.exp(_wander(rng, seconds))[second]
    # Work an arm can do a second, in requests, so that half of the traffic is `utilisation` of it on average.
    capacity = max(load.rate * 0.5, 0.5) / load.utilisation / effect.slowdown
    waiting = _backlog(counts, capacity)
    running = np.maximum(1, np.round(8 * np.minimum(1, _smooth(counts) / capacity) + waiting[:seconds]))[second]
    crowd = 1 + 0.03 * np.minimum(running, 32)
    tpot = 10.0 * slow * speed * crowd * np.exp(0.15 * noise + rng.normal(0, 0.1, total))
    ttft = 60.0 * slow * speed * crowd * np.exp(prompt + rng.normal(0, 0.2, total)) + 1000 * waiting[second] / capacity
    itl = tpot * (1.3 + rng.exponential(0.2, total))
    e2e = ttft + tokens * tpot
    incident = _incidents(rng, seconds)[second]
    error = rng.random(total) < 0.002 + 0.3 * incident + effect.errors
    garbled = rng.random(total) < flagged + effect.garbled
    compression = np.exp(0.8 + style + rng.normal(0, 0.15, total)) * np.where(garbled, 1.8, 1.0)
    order = np.argsort(arrival + e2e / 1000, kind="stable")
    values = np.stack([ttft, itl, tpot, e2e, 1000 / tpot, tokens, compression])
    return Requests(
        who[order],
        start_s + (arrival + e2e / 1000)[order],
        running[order].astype(np.int64),
        values[:, order],
        error[order],
        garbled[order],
    )


def _who(people: Population, members: Ints, total: int, *, candidate: bool, start_s: float) -> Ints:
    if not people.load.num_keys:
        first = int(start_s * 1e6) * 2 + candidate
        return first + 2 * np.arange(total)
    if not len(members):
        return np.zeros(0, np.int64)
    weight = people.activity[members]
    return members[np.searchsorted(np.cumsum(weight) / weight.sum(), people.rng.random(total) * (1 - 1e-12))]


def _lasting(rng: np.random.Generator, who: Ints, total: int, memory: float = 0.8) -> Floats:
    """[n] noise of variance 1 that a key's next request mostly repeats."""
    from scipy.signal import lfilter

    fresh = rng.normal(size=total)
    if not total:
        return fresh
    order = np.argsort(who, kind="stable")
    sorted_who = who[order]
    starts = np.flatnonzero(np.r_[True, sorted_who[1:] != sorted_who[:-1]])
    since = np.arange(total) - np.repeat(starts, np.diff(np.r_[starts, total]))
    scaled = fresh * np.where(since == 0, 1.0, np.sqrt(1 - memory**2))
    filtered = lfilter([1.0], [1.0, -memory], scaled)
    before = np.r_[0.0, filtered[:-1]][np.repeat(starts, np.diff(np.r_[starts, total]))]
    filtered -= before * memory ** (since + 1)
    noise = np.empty(total)
    noise[order] = filtered
    return noise


def _wander(rng: np.random.Generator, seconds: int) -> Floats:
    from scipy.signal import lfilter

    decay = np.exp(-1 / 15.0)
    fresh = rng.normal(size=seconds) * np.sqrt(1 - decay**2)
    fresh[0] = rng.normal()
    return np.asarray(0.08 * lfilter([1.0], [1.0, -decay], fresh))


def _smooth(counts: Ints, window: int = 5) -> Floats:
    sums = np.cumsum(np.r_[np.zeros(window), counts])
    return np.asarray((sums[window:] - sums[:-window]) / window)


def _backlog(counts: Ints, capacity: float) -> Floats:
    """[seconds] requests that wait at the end of each second: Lindley's recursion by running minima."""
    walk = np.cumsum(counts - capacity)
    return np.asarray(walk - np.minimum(0.0, np.minimum.accumulate(walk)))


def _incidents(rng: np.random.Generator, seconds: int) -> Floats:
    flags = np.zeros(seconds)
    for at in rng.integers(0, seconds, rng.poisson(seconds / 600)):
        flags[at : at + 5] = 1.0
    return flags
