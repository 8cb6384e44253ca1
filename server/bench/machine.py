"""Where and with what a result was measured. Never imports torch: the GPU's driver is asked through its own tool."""

from __future__ import annotations

import os
import platform
import re
import shlex
import subprocess
from collections.abc import Sequence
from datetime import UTC, datetime
from importlib import metadata
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent.parent
_PACKAGES = ("torch", "triton", "transformers", "numpy")
_GPU_FIELDS = ("name", "driver_version", "memory.total", "power.limit", "clocks.max.sm")
_SOURCES = ("server", "draft_models")


def head(name: str, arguments: Sequence[str], version: str, gpu: int | None) -> dict[str, Any]:
    """A result file's first fields. `gpu` is the index of the device that is measured, None for the CPU."""
    return {
        "name": name,
        "command": command(arguments),
        "commit": commit() or version,
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "machine": {**cpu(), **({} if gpu is None else describe_gpu(gpu))},
        "versions": {"outpace": version, **versions()},
    }


def command(arguments: Sequence[str]) -> str:
    """The command line; where files lay is private."""
    shown = [Path(word).name if Path(word).is_absolute() else word for word in arguments]
    return shlex.join(["outpace", "bench", *shown])


def commit() -> str | None:
    """The checkout's commit, `+dirty` if its sources differ from it; None outside a git checkout."""
    if not (ROOT / ".git").exists():
        return None
    found = _run(["git", "-C", str(ROOT), "rev-parse", "--short", "HEAD"])
    if not found:
        return None
    return found + ("+dirty" if _run(["git", "-C", str(ROOT), "status", "--porcelain", *_SOURCES]) else "")


def changed_files() -> list[str] | None:
    """Files of the checkout that differ from its commit, results apart; None outside a git checkout."""
    if not (ROOT / ".git").exists() or not _run(["git", "-C", str(ROOT), "rev-parse", "HEAD"]):
        return None
    lines = _run(["git", "-C", str(ROOT), "status", "--porcelain", "--", ".", ":!benchmarks/results"]) or ""
    return [line.split(maxsplit=1)[1] for line in lines.splitlines()]


def cpu() -> dict[str, Any]:
    """Processor, cores that this process may use, memory and load."""
    info = Path("/proc/cpuinfo")
    names = re.findall(r"^model name\s*:\s*(.+)$", info.read_text(), re.MULTILINE) if info.exists() else []
    return {
        "cpu": names[0] if names else platform.processor(),
        "cores": num_cores(),
        "memory_mib": os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") >> 20,
        "load_1m": round(os.getloadavg()[0], 2),
        "python": platform.python_version(),
    }


def num_cores() -> int:
    """Cores this process may use; not every system can tell."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def describe_gpu(index: int) -> dict[str, Any]:
    """Name, driver, memory, power limit and highest clock of a GPU, as far as nvidia-smi says."""
    line = _run(["nvidia-smi", f"--id={index}", f"--query-gpu={','.join(_GPU_FIELDS)}", "--format=csv,noheader"])
    values = [value.strip() for value in (line or "").split(",")]
    if len(values) != len(_GPU_FIELDS):
        return {"gpu": "unknown"}
    return dict(zip(("gpu", "driver", "gpu_memory", "gpu_power_limit", "gpu_max_clock"), values, strict=True))


def versions() -> dict[str, str]:
    """Of the libraries that decide speed, as far as they are installed."""
    found = {}
    for package in _PACKAGES:
        try:
            found[package] = metadata.version(package)
        except metadata.PackageNotFoundError:  # triton, on a CPU
            continue
    return found


def short_gpu_name(name: str) -> str:
    """`NVIDIA H100 80GB HBM3` as `h100`: how cases call a device."""
    match = re.search(r"\b([A-Z]{1,3}\d{2,4}[A-Z]?)\b", name)
    return match[1].lower() if match else re.sub(r"[^a-z0-9]+", "-", name.lower()).strip("-")


def _run(command: list[str]) -> str | None:
    """What a command prints, None if it is not there or fails."""
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=30)
    except (OSError, subprocess.TimeoutExpired):
        return None
    return done.stdout.strip() if done.returncode == 0 else None
