"""Distributions of lengths and times, as words of the command line."""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np

from loadtest.errors import invalid

VALID = "N, LOW-HIGH, normal:MEAN,STD, lognormal:MEDIAN,SIGMA or exponential:MEAN"
_ARITY = {"constant": 1, "uniform": 2, "normal": 2, "lognormal": 2, "exponential": 1}


@dataclass(frozen=True, slots=True)
class Distribution:
    """`kind` with its parameters; see VALID for how it is written."""

    kind: str
    parameters: tuple[float, ...]

    def draw(self, random: np.random.Generator) -> float:
        """One value, never negative."""
        first, second = (*self.parameters, 0.0)[:2]
        if self.kind == "constant":
            return first
        if self.kind == "uniform":
            return float(random.uniform(first, second))
        if self.kind == "normal":
            return max(0.0, float(random.normal(first, second)))
        if self.kind == "lognormal":
            return first * math.exp(second * float(random.standard_normal()))
        return float(random.exponential(first))

    def draw_int(self, random: np.random.Generator, least: int = 1) -> int:
        """One whole value; every one of a uniform range is as likely as the others."""
        if self.kind == "uniform":
            low, high = (int(x) for x in self.parameters)
            return max(least, int(random.integers(low, high + 1)))
        return max(least, round(self.draw(random)))


def constant(value: float) -> Distribution:
    """Always the same."""
    return Distribution("constant", (float(value),))


ZERO, ONE = constant(0), constant(1)


def parse_distribution(field: str, text: str) -> Distribution:
    """Raises LoadTestError naming `field`."""
    kind, colon, rest = text.partition(":")
    if not colon:
        low, dash, high = text.partition("-")
        kind, rest = ("uniform", f"{low},{high}") if dash else ("constant", low)
    try:
        parameters = tuple(float(part) for part in rest.split(","))
    except ValueError:
        raise invalid(field, text, VALID) from None
    if len(parameters) != _ARITY.get(kind) or not all(0 <= p < math.inf for p in parameters):
        raise invalid(field, text, VALID)
    if kind == "uniform" and parameters[0] > parameters[1]:
        raise invalid(field, text, "LOW-HIGH with LOW at most HIGH")
    return Distribution(kind, parameters)
