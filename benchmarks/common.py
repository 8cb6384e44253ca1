"""What every benchmark needs: prompts, the machine's description, a result file that says where its numbers come
from."""

from __future__ import annotations

import json
import os
import platform
import shlex
import statistics
import sys
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from importlib import metadata
from pathlib import Path
from typing import Any

from benchmarks.inputs import note_file, noted
from server.bench.machine import changed_files, commit, describe_gpu

ROOT = Path(__file__).resolve().parent.parent
RESULTS = Path(os.environ.get("OUTPACE_RESULTS") or ROOT / "benchmarks" / "results")
PROMPTS = ROOT.parent / "shared" / "prompts" / "spec_bench.jsonl"


@dataclass(frozen=True)
class Row:
    """One measured number. `spread` is (lowest, highest) of the repeats, or what the note says that it is. `verdict` is
    on its target where the value alone does not tell: "met", "missed" or "not shown"."""

    case: str
    value: float
    unit: str
    spread: tuple[float, float] | None = None
    note: str = ""
    verdict: str = ""


@dataclass(frozen=True)
class Prompt:
    """One evaluation prompt, first turn."""

    id: str
    category: str
    text: str


def load_prompts(path: Path = PROMPTS, per_category: int | None = None) -> list[Prompt]:
    """Evaluation prompts, the first `per_category` of each category. Raises FileNotFoundError saying what is needed."""
    if not path.exists():
        raise FileNotFoundError(
            f"{path}: the evaluation prompts are not part of the repository; give a path to a JSONL "
            "file with id, category, turns"
        )
    note_file("prompts", path)
    seen: dict[str, int] = {}
    prompts: list[Prompt] = []
    for line in path.read_text().splitlines():
        raw = json.loads(line)
        seen[raw["category"]] = seen.get(raw["category"], 0) + 1
        if per_category is None or seen[raw["category"]] <= per_category:
            prompts.append(Prompt(raw["id"], raw["category"], raw["turns"][0]))
    return prompts


def machine() -> dict[str, Any]:
    """Processor, cores, memory and load of this machine, and its GPU if torch was loaded and sees one."""
    cpu = next(
        (
            line.split(":", 1)[1].strip()
            for line in Path("/proc/cpuinfo").read_text().splitlines()
            if line.startswith("model name")
        ),
        platform.processor(),
    )
    flags = Path("/proc/cpuinfo").read_text()
    isa = "avx512" if "avx512f" in flags else "avx2" if "avx2" in flags else "other"
    memory = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") >> 20
    return {
        "cpu": cpu,
        "isa": isa,
        "cores": len(os.sched_getaffinity(0)),
        "memory_mib": memory,
        "load_1m": round(os.getloadavg()[0], 2),
        "python": platform.python_version(),
        **_gpu(),
    }


def _gpu() -> dict[str, Any]:
    torch = sys.modules.get("torch")
    return describe_gpu(0) if torch is not None and torch.cuda.is_available() else {}


def versions(
    names: Iterable[str] = ("torch", "triton", "transformers", "numpy", "aiohttp", "uvloop"),
) -> dict[str, str]:
    """Of those that are installed."""
    found = {}
    for name in names:
        try:
            found[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
    return found


def median_row(case: str, values: Sequence[float], unit: str, note: str = "") -> Row:
    """Median of repeats with their range."""
    return Row(case, round(statistics.median(values), 4), unit, (round(min(values), 4), round(max(values), 4)), note)


def write_result(name: str, rows: list[Row], detail: dict[str, Any] | None = None, *, show: bool = True) -> Path:
    """Writes `results/<name>.json` and prints the rows (`show`: or not, where they are not the last).

    With the rows go what the script has read, by content, and which files differ from the commit (null: not known).
    """
    script, *rest = sys.argv
    arguments = [Path(word).name if Path(word).is_absolute() else word for word in rest]  # where files lay is private
    command = shlex.join(["python", str(Path(script).resolve().relative_to(ROOT)), *arguments])
    content = {
        "name": name,
        "command": command,
        "commit": commit() or "",
        "changed_files": changed_files(),
        "inputs": noted(),
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "machine": machine(),
        "versions": versions(),
        "rows": [_fields(r) for r in rows],
        **({"detail": detail} if detail else {}),
    }
    RESULTS.mkdir(parents=True, exist_ok=True)
    file = RESULTS / f"{name}.json"
    file.write_text(json.dumps(content, indent=1) + "\n")
    for r in rows if show else ():
        print(f"{r.case:60} {r.value:10.3f} {r.unit:8} {r.spread or ''} {r.verdict} {r.note}")
    return file


def _fields(row: Row) -> dict[str, Any]:
    """Without a verdict where there is none."""
    return {name: value for name, value in asdict(row).items() if name != "verdict" or value}
