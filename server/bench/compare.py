"""Another result's rows beside ours. Never imports torch."""

from __future__ import annotations

import json
from pathlib import Path

from server.bench.report import Row, Table, number
from server.config import ConfigError


def read_rows(file: Path) -> dict[str, Row]:
    """The rows of a result file by case. Raises ConfigError with what is wrong with it."""
    try:
        rows = json.loads(file.read_text(encoding="utf-8"))["rows"]
        return {str(r["case"]): Row(str(r["case"]), float(r["value"]), str(r.get("unit", ""))) for r in rows}
    except OSError as error:
        raise ConfigError(f"compare: {str(file)!r} cannot be read: {error.strerror}") from None
    except (ValueError, KeyError, TypeError, AttributeError):
        raise ConfigError(f"compare: {str(file)!r} is no result file; it needs rows of case and value") from None


def comparison(ours: list[Row], theirs: dict[str, Row]) -> Table:
    """Ours and theirs for every case that both have; the ratio is ours to theirs."""
    both = [(row, theirs[row.case]) for row in ours if row.case in theirs]
    lines = [
        [
            row.case,
            row.unit,
            number(row.value),
            number(other.value),
            f"{row.value / other.value:.2f}" if other.value else "",
        ]
        for row, other in both
    ]
    alone = len(ours) - len(both)
    title = "compared" + (f" ({alone} of our cases are not in the other file)" if alone else "")
    return Table(title, ["case", "unit", "ours", "theirs", "ratio"], lines, num_names=2)
