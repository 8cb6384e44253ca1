"""Rows, the tables of the terminal, and the result file. Never imports torch."""

from __future__ import annotations

import json
import statistics
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any


class BenchError(RuntimeError):
    """A measurement can not go on; the message is one line for the person who started it."""


@dataclass(frozen=True, slots=True)
class Row:
    """One measured number. `spread` is (lowest, highest) of the repeats, None where there was one measurement."""

    case: str
    value: float
    unit: str
    spread: tuple[float, float] | None = None
    note: str = ""


@dataclass(frozen=True, slots=True)
class Spread:
    """Median and range of repeats."""

    median: float
    low: float
    high: float

    @staticmethod
    def of(values: Sequence[float]) -> Spread:
        return Spread(statistics.median(values), min(values), max(values))

    def row(self, case: str, unit: str, note: str = "") -> Row:
        return Row(case, round(self.median, 4), unit, (round(self.low, 4), round(self.high, 4)), note)

    def cells(self) -> list[str]:
        """Median, lowest, highest for a table."""
        return [number(self.median), number(self.low), number(self.high)]


@dataclass(frozen=True, slots=True)
class Table:
    """Lines under headers that carry the units. The first `num_names` columns are words and lean left."""

    title: str
    columns: list[str]
    lines: list[list[str]]
    num_names: int = 0

    def __str__(self) -> str:
        widths = [max(map(len, column)) for column in zip(self.columns, *self.lines, strict=True)]

        def line(cells: list[str]) -> str:
            pairs = enumerate(zip(cells, widths, strict=True))
            return "  ".join(c.ljust(w) if i < self.num_names else c.rjust(w) for i, (c, w) in pairs).rstrip()

        return "\n".join([self.title, *(f"  {line(cells)}" for cells in [self.columns, *self.lines])])


def number(value: float) -> str:
    """Four significant digits, no exponent, thousands apart."""
    size = abs(value)
    if size >= 1000 or value == int(value):
        return f"{value:,.0f}"
    return f"{value:.{3 if size < 10 else 2 if size < 100 else 1}f}"


@dataclass(slots=True)
class Report:
    """Collects rows; with a `file`, what it has is on disk after every `add`."""

    head: dict[str, Any]
    file: Path | None = None
    rows: list[Row] = field(default_factory=list)
    detail: dict[str, Any] = field(default_factory=dict)

    def add(self, rows: list[Row]) -> None:
        """Takes a subject's rows and writes the file anew. Raises BenchError if it can not be written."""
        self.rows += rows
        if self.file is None:
            return
        content = {**self.head, "rows": [asdict(row) for row in self.rows], "detail": self.detail}
        partial = self.file.with_name(self.file.name + ".partial")
        try:
            partial.write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")
            partial.replace(self.file)
        except OSError as error:
            raise BenchError(f"{self.file}: cannot be written: {error.strerror}") from error
