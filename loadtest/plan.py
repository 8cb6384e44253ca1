"""Everything that is going to be sent, decided beforehand from the settings and the seed: sessions, times, bodies."""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from loadtest.arrivals import closed_loop, open_loop, replay
from loadtest.datasets import read_sessions
from loadtest.distribution import constant
from loadtest.errors import invalid
from loadtest.settings import ENDPOINTS, Asked, Load, Settings, Target
from loadtest.synthetic import Lengths, Scale, sessions
from loadtest.tokens import count_fields
from loadtest.workload import NORMAL, Behaviour, Session, Turn

DEFAULT_OUTPUT = 128
"""Tokens of a synthetic answer where nothing was said."""


@dataclass(frozen=True, slots=True)
class Server:
    """What was found out of the target before the run: its model, how to count its tokens, the scale of its
    tokenizer."""

    model: str
    way: str
    scale: Scale = field(default_factory=Scale)


def session_source(asked: Asked, scale: Scale, seed: int) -> Iterator[Session]:
    """Sessions without end: made up, or a file's again and again. Raises LoadTestError."""
    if asked.workload is None:
        output = asked.output_tokens or constant(DEFAULT_OUTPUT)
        lengths = Lengths(
            asked.input_tokens, output, asked.prefix_tokens, asked.num_prefixes, asked.turns, asked.think_s
        )
        return sessions(lengths, scale, seed)
    return itertools.cycle(read_sessions(asked.workload, scale, seed, asked.max_turns))


def start_times(load: Load, asked: Asked, scale: Scale, seed: int) -> list[float]:
    """When sessions begin; of a closed loop: when users do. Raises LoadTestError."""
    if load.concurrency is not None:
        return closed_loop(load.concurrency, load.ramp_s)
    if load.replay:
        assert asked.workload is not None
        stamps = [session.at_s for session in read_sessions(asked.workload, scale, seed)]
        known = [at for at in stamps if at is not None]
        if len(known) != len(stamps):
            raise invalid("replay", str(asked.workload), "a file in which every line has a timestamp")
        times = replay(known, load.speed)[: load.requests]
        return [at for at in times if load.duration_s is None or at < load.duration_s]
    assert load.rate is not None
    return open_loop(
        load.rate,
        seed,
        process=load.arrivals,
        burstiness=load.burstiness,
        count=load.requests,
        duration_s=load.duration_s,
        ramp_to=load.ramp_to,
        ramp_s=load.ramp_s,
    )


class Bodies:
    """Makes the bodies of requests. What turn t of session s asks for depends on nothing but the seed."""

    def __init__(self, target: Target, asked: Asked, server: Server, seed: int) -> None:
        self._chat = target.endpoint == "chat"
        self._asked, self._seed = asked, seed
        self._base = {"model": server.model, "stream": True, **count_fields(server.way, target.endpoint)}
        if asked.ignore_eos:
            self._base["ignore_eos"] = True
        self.url = target.url.rstrip("/").removesuffix("/v1") + ENDPOINTS[target.endpoint]

    def body(self, session: int, number: int, turn: Turn, history: list[dict[str, Any]]) -> dict[str, Any]:
        """A body whose conversation is `history`, this turn's messages at its end."""
        random = np.random.default_rng([self._seed, 5, session, number])
        body = {**self._base, **self._asked.fields, **turn.fields}
        if self._chat:
            body["messages"] = history
        else:
            body["prompt"] = "\n".join(_content(message) for message in history)
        wanted = turn.max_tokens
        if self._asked.output_tokens is not None and self._asked.workload is not None:
            wanted = self._asked.output_tokens.draw_int(random)
        if wanted is not None:
            body["max_tokens"] = wanted
        if self._asked.temperatures:
            body["temperature"] = float(random.choice(self._asked.temperatures))
        return body

    def behaviour(self, session: int, number: int, max_tokens: int | None) -> Behaviour:
        """How this request's reader behaves; a cancellation comes at a random token of the answer."""
        asked = self._asked
        if not asked.cancel_share and not asked.slow_share:
            return NORMAL
        random = np.random.default_rng([self._seed, 6, session, number])
        drawn = float(random.random())
        if drawn < asked.cancel_share:
            return Behaviour(cancel_after=int(random.integers(1, max(2, max_tokens or 32))))
        if drawn < asked.cancel_share + asked.slow_share:
            return Behaviour(bytes_per_s=asked.slow_bytes_per_s)
        return NORMAL


def _content(message: dict[str, Any]) -> str:
    content = message.get("content")
    if isinstance(content, str):
        return content
    return "\n".join(part.get("text", "") for part in content or ())


@dataclass(frozen=True, slots=True)
class Job:
    """One generator process's part of a run: every n-th session.

    `times`: when they, or a closed loop's users, begin.
    """

    settings: Settings
    server: Server
    seed: int
    times: Sequence[float]
    sessions: Iterator[tuple[int, Session]]
    share: int = 0


def job_of(settings: Settings, server: Server, seed: int, share: int = 0) -> Job:
    """Decides all that can be decided before the start: reading a file later would make the first requests late."""
    every = slice(share, None, settings.processes)
    times = start_times(settings.load, settings.asked, server.scale, seed)[every]
    source = enumerate(session_source(settings.asked, server.scale, seed))
    mine = itertools.islice(source, every.start, None, every.step)
    return Job(settings, server, seed, times, itertools.chain([next(mine)], mine), share)
