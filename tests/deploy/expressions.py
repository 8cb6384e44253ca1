"""The expressions that Grafana and Prometheus get from deploy/."""

from __future__ import annotations

import importlib.util
import json
import re
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import yaml

DEPLOY = Path(__file__).resolve().parents[2] / "deploy"
ALERTS = DEPLOY / "prometheus" / "alerts.yml"


def _load(path: Path) -> Any:
    spec = importlib.util.spec_from_file_location(f"deploy_{path.stem}", path)
    assert spec is not None and spec.loader is not None
    module = sys.modules[spec.name] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


build = _load(DEPLOY / "grafana" / "build.py")


def dashboards() -> list[Path]:
    return sorted((DEPLOY / "grafana" / "dashboards").glob("*.json"))


def panels() -> Iterator[tuple[str, dict[str, Any]]]:
    """Every panel with its dashboard's name."""
    for path in dashboards():
        for panel in json.loads(path.read_text())["panels"]:
            yield path.stem, panel


def alerts() -> list[dict[str, Any]]:
    groups = yaml.safe_load(ALERTS.read_text())["groups"]
    return [rule for group in groups for rule in group["rules"]]


def expressions(window: str = "1m", interval: str = "10s") -> dict[str, str]:
    """Every panel's expression by where it is, as Grafana would send it with all arms chosen."""
    found = {}
    for name, panel in panels():
        for target in panel["targets"]:
            sent = target["expr"].replace("$__rate_interval", interval).replace("$window", window)
            found[f"{name}/{panel['title']}/{target['refId']}"] = sent.replace("$arm", ".*")
    return found


def compared(expression: str) -> str:
    """What an alert compares with its limit."""
    left, limit = re.fullmatch(r"(.+) (?:==|>|<) ([\d.]+)", expression.strip(), re.DOTALL).groups()  # type: ignore[union-attr]
    assert left and limit
    return str(left)
