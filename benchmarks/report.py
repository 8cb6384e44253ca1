"""Every committed case beside its target, misses first; rewrites the tables of benchmarks/README.md.

    python benchmarks/report.py

Targets are in targets.toml; a pattern with `*` holds for cases that no earlier line names. `peer`, where it is given,
is another engine's figure on the same kind of machine; behind it stands ours as a share of it.
"""

from __future__ import annotations

import fnmatch
import json
import sys
import tomllib
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from benchmarks.common import Row
from benchmarks.text.plot import curves, plot_sweep

FOLDER = Path(__file__).resolve().parent
MARK = "<!-- tables below are written by benchmarks/report.py -->"


def target_of(case: str, targets: dict[str, dict[str, Any]]) -> dict[str, Any] | None:
    """The first line of targets.toml whose pattern fits."""
    return next((target for pattern, target in targets.items() if fnmatch.fnmatchcase(case, pattern)), None)


def met(value: float, target: dict[str, Any]) -> bool:
    """Whether the value reaches its target; without one, nothing is missed."""
    if "target" not in target:
        return True
    wanted = float(target["target"])
    return value >= wanted if target["better"] == "higher" else value <= wanted


def verdict(row: dict[str, Any], target: dict[str, Any]) -> str:
    """The row's own, where its script knew how certain the value is; else by the value alone."""
    return str(row.get("verdict") or ("met" if met(row["value"], target) else "missed"))


SHOWN = ("torch", "triton", "transformers", "aiohttp", "uvloop")


def table(result: dict[str, Any], targets: dict[str, dict[str, Any]]) -> tuple[list[str], int]:
    """Markdown lines of one result file, and how many of its cases miss."""
    found = [(row, target_of(row["case"], targets) or {}) for row in result["rows"]]
    has_peer = any("peer" in target for _, target in found)
    missed = [verdict(row, target) != "met" for row, target in found]
    lines = [_line(row, target, miss, has_peer) for (row, target), miss in zip(found, missed, strict=True)]
    ordered = [line for line, miss in zip(lines, missed, strict=True) if miss]
    ordered += [line for line, miss in zip(lines, missed, strict=True) if not miss]
    columns = ["case", "value", "target", *(["peer, ours / peer"] if has_peer else []), "spread", "note"]
    head = [
        f"### {result['name']}",
        "",
        f"{_provenance(result)} Raw: [results/{result['file']}](results/{result['file']})",
        "",
        *_plot(result),
        f"| {' | '.join(columns)} |",
        f"| {' | '.join('---' for _ in columns)} |",
    ]
    return [*head, *ordered, ""], sum(missed)


def _plot(result: dict[str, Any]) -> list[str]:
    """Draws a load sweep anew; nothing for other results."""
    rows = [Row(row["case"], row["value"], row["unit"]) for row in result["rows"]]
    if not curves(rows):
        return []
    file = f"results/{Path(result['file']).stem}.svg"
    plot_sweep(rows, result["name"], FOLDER / file)
    return [f"![Throughput by number of streams]({file})", ""]


def _line(row: dict[str, Any], target: dict[str, Any], missed: bool, has_peer: bool) -> str:
    sign = f"{'≥' if target['better'] == 'higher' else '≤'} {target['target']:g}" if "target" in target else ""
    peer = f"{target['peer']:g}, {row['value'] / target['peer']:.2f}" if "peer" in target else ""
    spread = f"{row['spread'][0]:g} … {row['spread'][1]:g}" if row["spread"] else ""
    shown = f"**{row['value']:g} ({verdict(row, target)})**" if missed else f"{row['value']:g}"
    note = row["note"].split(";", 1)[-1].strip() if row["note"].startswith("target") else row["note"]
    cells = [f"`{row['case']}`", f"{shown} {row['unit']}", sign, *([peer] if has_peer else []), spread, note]
    return f"| {' | '.join(cells)} |"


def _provenance(result: dict[str, Any]) -> str:
    machine, versions = result["machine"], result["versions"]
    isa = f" ({machine['isa']})" if "isa" in machine else ""
    gpu = f", one {machine['gpu']}, driver {machine.get('driver', '?')}" if "gpu" in machine else ""
    shown_versions = ", ".join(f"{name} {versions[name]}" for name in SHOWN if name in versions)
    return (
        f"`{result['command']}`, commit `{result['commit']}`, {result['date'][:10]}; {machine['cpu']}{isa}, "
        f"{machine['cores']} cores, {machine['memory_mib']} MiB{gpu}; {shown_versions}."
    )


def main() -> None:
    targets = tomllib.loads((FOLDER / "targets.toml").read_text())["cases"]
    lines: list[str] = []
    misses = 0
    for file in sorted((FOLDER / "results").glob("*.json")):
        found, missed = table({**json.loads(file.read_text()), "file": file.name}, targets)
        lines += found
        misses += missed
    page = FOLDER / "README.md"
    page.write_text(page.read_text().split(MARK)[0] + MARK + "\n\n" + "\n".join(lines).rstrip() + "\n")
    print("\n".join(lines))
    print(f"{misses} cases miss their target")
    sys.exit(1 if misses else 0)


if __name__ == "__main__":
    main()
