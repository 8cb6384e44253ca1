"""Limits on what was measured: service-level objectives of each request, assertions on the whole run."""

from __future__ import annotations

import operator
import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass

from loadtest.errors import invalid

OBJECTIVES = ("ttft", "tpot", "itl", "e2el", "gap")
"""What a request can be held to, in milliseconds; `itl` and `gap` mean its largest one."""

_OPERATORS: dict[str, Callable[[float, float], bool]] = {
    "<=": operator.le,
    ">=": operator.ge,
    "<": operator.lt,
    ">": operator.gt,
}
_ASSERTION = re.compile(r"\s*([a-z][a-z0-9_.]*)\s*(<=|>=|<|>)\s*([-+0-9.eE]+)\s*")


@dataclass(frozen=True, slots=True)
class Objective:
    """`metric` of a good request is at most `limit_ms`."""

    metric: str
    limit_ms: float


@dataclass(frozen=True, slots=True)
class Assertion:
    """`metric` compared to `limit` with `operator`, such as `p95_ttft_ms<200`."""

    metric: str
    operator: str
    limit: float

    def __str__(self) -> str:
        return f"{self.metric}{self.operator}{self.limit:g}"


@dataclass(frozen=True, slots=True)
class Outcome:
    """An assertion with the value that it was held against."""

    assertion: Assertion
    value: float
    holds: bool


def parse_objective(text: str) -> Objective:
    """`ttft:200`, the form of `vllm bench serve --goodput`. Raises LoadTestError."""
    name, colon, limit = text.partition(":")
    valid = f"NAME:MILLISECONDS with a name of {', '.join(OBJECTIVES)}"
    try:
        value = float(limit)
    except ValueError:
        raise invalid("goodput", text, valid) from None
    if not colon or name not in OBJECTIVES or not value >= 0:
        raise invalid("goodput", text, valid)
    return Objective(name, value)


def parse_assertion(text: str) -> Assertion:
    """`p95_ttft_ms<200`. Whether the metric exists is known only once it was measured. Raises LoadTestError."""
    found = _ASSERTION.fullmatch(text)
    valid = "METRIC, one of < <= > >=, and a number, as in p95_ttft_ms<200"
    if found is None:
        raise invalid("assert", text, valid)
    try:
        return Assertion(found[1], found[2], float(found[3]))
    except ValueError:
        raise invalid("assert", text, valid) from None


_PERCENTILE = re.compile(r"p(\d+(?:\.\d+)?)_(\w+)_ms")


def check_metrics(assertions: Iterable[Assertion], known: Iterable[str], metrics: Iterable[str]) -> None:
    """Raises LoadTestError for a metric that no run has, before anything is sent."""
    names, of = set(known), set(metrics)
    for assertion in assertions:
        percentile = _PERCENTILE.fullmatch(assertion.metric)
        fits = percentile is not None and percentile[2] in of and float(percentile[1]) <= 100
        if not fits and assertion.metric not in names:
            valid = f"p50_X_ms to p100_X_ms with X of {', '.join(sorted(of))}, or one of {', '.join(sorted(names))}"
            raise invalid("assert", str(assertion), valid)


def percentiles_of(assertions: Iterable[Assertion]) -> set[float]:
    """The percentiles that assertions need."""
    found = (_PERCENTILE.fullmatch(assertion.metric) for assertion in assertions)
    return {float(match[1]) for match in found if match is not None}


def check(assertions: Iterable[Assertion], values: Mapping[str, float]) -> list[Outcome]:
    """Each assertion against the measured values; what was not measured (no answer at all) does not hold."""
    outcomes = []
    for assertion in assertions:
        value = values.get(assertion.metric, float("nan"))
        outcomes.append(Outcome(assertion, value, _OPERATORS[assertion.operator](value, assertion.limit)))
    return outcomes
