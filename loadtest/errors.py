"""What is wrong with what the user asked for."""

from __future__ import annotations

import math


class LoadTestError(ValueError):
    """A message of one line that names the field, its value and what would be valid."""


def invalid(field: str, value: object, valid: str) -> LoadTestError:
    """The error of a bad value, in the words that all of them have."""
    return LoadTestError(f"{field}: {value!r} is not valid; use {valid}")


def positive(name: str, value: float | None) -> None:
    """Raises LoadTestError for a value that is neither None nor a finite number above 0."""
    if value is not None and not 0 < value < math.inf:
        raise invalid(name, value, "1 or more" if isinstance(value, int) else "a finite number above 0")


def not_negative(name: str, value: float) -> None:
    """Raises LoadTestError for a negative or infinite value."""
    if not 0 <= value < math.inf:
        raise invalid(name, value, "0 or more")


def one_of(name: str, value: str, valid: tuple[str, ...]) -> None:
    """Raises LoadTestError for a value that is not listed."""
    if value not in valid:
        raise invalid(name, value, f"one of {', '.join(valid)}")
