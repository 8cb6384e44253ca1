"""Every committed case beside its target, misses first; rewrites the tables of benchmarks/README.md.

    python benchmarks/report.py

Targets are in targets.toml; a pattern with `*` holds for cases that no earlier line names.
"""

from __future__ import annotations

import fnmatch
import json
import sys
import tomllib
from pathlib import Path
from typing import Any

FOLDER = Path(__file__).resolve().parent
MARK = "<!-- tables below are written by benchmarks/report.py -->"


def target_of(case: str, targets: dict[str, dict[str, Any]]) -> dict[str, Any] | None:
    """The first line of targets.toml whose pattern fits."""
    return next((target for pattern, target in targets.items() if fnmatch.fnmatchcase(case, pattern)), None)


def met(value: float, target: dict[str, Any]) -> bool:
    """Whether the value reaches its target."""
    wanted = float(target["target"])
    return value >= wanted if target["better"] == "higher" else value <= wanted


SHOWN = ("torch", "transformers", "aiohttp", "uvloop")


def table(result: dict[str, Any], targets: dict[str, dict[str, Any]]) -> tuple[list[str], int]:
    """Markdown lines of one result file, and how many of its cases miss."""
    lines: list[str] = []
    misses: list[str] = []
    for row in result["rows"]:
        target = target_of(row["case"], targets)
        missed = target is not None and not met(row["value"], target)
        sign = "" if target is None else f"{'≥' if target['better'] == 'higher' else '≤'} {target['target']:g}"
        spread = f"{row['spread'][0]:g} … {row['spread'][1]:g}" if row["spread"] else ""
        shown = f"**{row['value']:g} (missed)**" if missed else f"{row['value']:g}"
        note = row["note"].split(";", 1)[-1].strip() if row["note"].startswith("target") else row["note"]
        line = f"| `{row['case']}` | {shown} {row['unit']} | {sign} | {spread} | {note} |"
        (misses if missed else lines).append(line)
    machine, versions = result["machine"], result["versions"]
    shown_versions = ", ".join(f"{name} {versions[name]}" for name in SHOWN if name in versions)
    head = [
        f"### {result['name']}",
        "",
        f"`{result['command']}`, commit `{result['commit']}`, {result['date'][:10]}; {machine['cpu']} "
        f"({machine['isa']}), {machine['cores']} cores, {machine['memory_mib']} MiB; {shown_versions}. "
        f"Raw: [results/{result['file']}](results/{result['file']})",
        "",
        "| case | value | target | spread | note |",
        "| --- | --- | --- | --- | --- |",
    ]
    return [*head, *misses, *lines, ""], len(misses)


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
