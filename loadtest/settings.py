"""Settings of one load test, and the one place that checks them."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from loadtest.arrivals import PROCESSES
from loadtest.asserts import Assertion, Objective
from loadtest.distribution import ONE, ZERO, Distribution, constant
from loadtest.errors import LoadTestError, invalid, not_negative, one_of, positive
from loadtest.tokens import COUNTS

DEFAULT_INPUT = constant(128)
ENDPOINTS = {"chat": "/v1/chat/completions", "completions": "/v1/completions"}


@dataclass(frozen=True, slots=True)
class Target:
    """Whom to ask. `model` None: the first one that the server lists."""

    url: str
    endpoint: str = "chat"
    model: str | None = None
    headers: dict[str, str] = field(default_factory=dict)
    timeout_s: float = 600.0
    token_counts: str = "auto"

    def __post_init__(self) -> None:
        parts = urlsplit(self.url)
        if parts.scheme not in ("http", "https") or not parts.hostname:
            raise invalid("url", self.url, "http://HOST:PORT or https://HOST")
        one_of("endpoint", self.endpoint, tuple(ENDPOINTS))
        one_of("token_counts", self.token_counts, ("auto", *COUNTS))
        positive("timeout_s", self.timeout_s)


@dataclass(frozen=True, slots=True)
class Load:
    """How requests arrive: a `rate`, a `concurrency` or a replay. `requests` counts sessions; either it or
    `duration_s` ends the run."""

    rate: float | None = None
    concurrency: int | None = None
    replay: bool = False
    speed: float = 1.0
    arrivals: str = "poisson"
    burstiness: float = 1.0
    ramp_to: float | None = None
    ramp_s: float = 0.0
    max_concurrency: int | None = None
    requests: int | None = None
    duration_s: float | None = None

    def __post_init__(self) -> None:
        if [self.rate is not None, self.concurrency is not None, self.replay].count(True) != 1:
            raise LoadTestError(
                "rate: one of --rate, --concurrency and --replay says how requests arrive; use just one"
            )
        if self.rate is not None and not self.rate > 0:
            raise invalid("rate", self.rate, "requests a second above 0, or inf")
        for name in ("concurrency", "max_concurrency", "requests"):
            positive(name, getattr(self, name))
        for name in ("duration_s", "ramp_to", "burstiness", "speed"):
            positive(name, getattr(self, name))
        one_of("arrivals", self.arrivals, PROCESSES)
        not_negative("ramp_s", self.ramp_s)
        if self.ramp_to is not None and (self.rate is None or math.isinf(self.rate) or not self.ramp_s):
            raise invalid("ramp_to", self.ramp_to, "a finite --rate with --ramp-s above 0, or leave it out")
        if self.requests is None and not self.replay and (self.duration_s is None or self.rate == math.inf):
            raise invalid(
                "requests", self.requests, "--requests N, or --duration-s with a finite --rate or --concurrency"
            )


@dataclass(frozen=True, slots=True)
class Asked:
    """What is asked and how answers are read. `workload` None is synthetic; `fields` join every body."""

    workload: Path | None = None
    input_tokens: Distribution = DEFAULT_INPUT
    output_tokens: Distribution | None = None
    prefix_tokens: int = 0
    num_prefixes: int = 1
    turns: Distribution = ONE
    think_s: Distribution = ZERO
    max_turns: int | None = None
    temperatures: tuple[float, ...] = ()
    ignore_eos: bool = False
    fields: dict[str, Any] = field(default_factory=dict)
    cancel_share: float = 0.0
    slow_share: float = 0.0
    slow_bytes_per_s: float = 200.0

    def __post_init__(self) -> None:
        not_negative("prefix_tokens", self.prefix_tokens)
        positive("num_prefixes", self.num_prefixes)
        positive("max_turns", self.max_turns)
        positive("slow_bytes_per_s", self.slow_bytes_per_s)
        for name in ("cancel_share", "slow_share"):
            if not 0 <= getattr(self, name) <= 1:
                raise invalid(name, getattr(self, name), "a share from 0 to 1")
        if self.cancel_share + self.slow_share > 1:
            raise invalid("cancel_share", self.cancel_share, f"a sum with slow_share ({self.slow_share}) of at most 1")
        for value in self.temperatures:
            not_negative("temperature", value)


@dataclass(frozen=True, slots=True)
class Output:
    """What is reported, and where to. Paths None: not written."""

    json: Path | None = None
    aiperf_json: Path | None = None
    csv: Path | None = None
    html: Path | None = None
    objectives: tuple[Objective, ...] = ()
    asserts: tuple[Assertion, ...] = ()
    live: bool | None = None
    percentiles: tuple[float, ...] = (50.0, 90.0, 95.0, 99.0)


@dataclass(frozen=True, slots=True)
class Modes:
    """Several runs in place of one: at each of `loads`, a search for the highest that keeps `tests`, or two sides in
    turn."""

    loads: tuple[float, ...] = ()
    tests: tuple[Assertion, ...] = ()
    precision: float = 0.05
    compare: Target | None = None
    twin: bool = False

    def __post_init__(self) -> None:
        positive("precision", self.precision)
        if [bool(self.loads), bool(self.tests), self.compare is not None, self.twin].count(True) > 1:
            raise LoadTestError(
                "sweep_rates: one of --sweep-rates, --sweep-concurrency, --find-highest, --compare and --twin; "
                "use just one"
            )
        for load in self.loads:
            positive("sweep_rates", load)

    @property
    def two_sided(self) -> bool:
        """Whether two things are compared."""
        return self.compare is not None or self.twin


@dataclass(frozen=True, slots=True)
class Settings:
    """A whole load test. `warmup_s` cuts what was meant to be sent before; `repeats` runs are measured alike."""

    target: Target
    load: Load
    asked: Asked = Asked()
    output: Output = Output()
    warmup_s: float = 0.0
    repeats: int = 1
    seed: int = 0
    processes: int = 1
    modes: Modes = Modes()

    def __post_init__(self) -> None:
        if self.load.replay and (self.modes.loads or self.modes.tests):
            raise invalid("replay", True, "a --rate or a --concurrency where several loads are measured")
        not_negative("warmup_s", self.warmup_s)
        not_negative("seed", self.seed)
        positive("repeats", self.repeats)
        positive("processes", self.processes)
        duration = self.load.duration_s
        if duration is not None and self.warmup_s >= duration:
            raise invalid("warmup_s", self.warmup_s, f"less than duration_s ({duration})")
        if self.load.replay and self.asked.workload is None:
            raise invalid("replay", True, "a --workload file with timestamps")
        if self.load.concurrency is not None and self.processes > self.load.concurrency:
            raise invalid("processes", self.processes, f"at most the concurrency ({self.load.concurrency})")
