"""The experiment as Prometheus sees it, from the process that owns it."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import Any

from prometheus_client import Metric
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily

from server.routing.guards import GUARDS
from server.telemetry.families import PREFIX

VERDICTS = {"promoted": 1.0, "rolled_back": -1.0}
STATUSES = ("waiting", "running", "paused", "promoted", "rolled_back")
_CLAIMS = {"worse": -1.0, "undecided": 0.0, "better": 1.0}


class ExperimentMetrics:
    """A collector. `report` is `Conductor.report`."""

    def __init__(self, report: Callable[[], Mapping[str, Any]]) -> None:
        self._report = report

    def collect(self) -> Iterable[Metric]:
        """Bounds that are not known are infinite, estimates NaN."""
        report = self._report()
        name = str(report["name"])
        yield from _progress(report, name)
        yield from _evidence(report, name)
        trips = CounterMetricFamily(
            _named("guard_trips"), "Times a guard rail rolled the candidate back.", labels=["experiment", "guard"]
        )
        for guard in GUARDS:
            trips.add_metric([name, guard], float(str(report["reason"]).startswith(f"guard rail, {guard}")))
        yield trips


def _progress(report: Mapping[str, Any], name: str) -> Iterable[Metric]:
    stage = 0 if report["stage"] is None else report["stage"] + 1
    yield _gauge("stage", "Number of the stage, the first is 1; 0 before it begins.", name, stage)
    yield _gauge("stages", "Number of stages.", name, len(report["stages"]))
    verdict = VERDICTS.get(report["status"], 0.0)
    yield _gauge("verdict", "1: the candidate was promoted, -1: rolled back, 0: no verdict yet.", name, verdict)
    status = GaugeMetricFamily(_named("status"), "1 for the status that it has.", labels=["experiment", "status"])
    for one in STATUSES:
        status.add_metric([name, one], float(report["status"] == one))
    weight = GaugeMetricFamily(
        _named("weight"), "Share of the traffic that the arm gets, 0 to 1.", labels=["experiment", "arm"]
    )
    for arm, percent in report["weights"].items():
        weight.add_metric([name, arm], percent / 100)
    requests = CounterMetricFamily(_named("requests"), "Requests that count.", labels=["experiment", "arm"])
    for role in ("candidate", "baseline"):
        requests.add_metric([name, report["arms"][role]], report[f"num_{role}"])
    yield from (status, weight, requests)


def _evidence(report: Mapping[str, Any], name: str) -> Iterable[Metric]:
    """Effects are relative changes, differences, or shares less 1/2: see `server.routing.evidence.metrics.Finding`."""
    values: dict[str, tuple[str, Callable[[Mapping[str, Any]], float]]] = {
        "effect": ("What the candidate changes, as estimated.", lambda one: one["estimate"]),
        "effect_lower": ("Lower bound of that, valid at every moment.", lambda one: one["lower"]),
        "effect_upper": ("Upper bound of that, valid at every moment.", lambda one: one["upper"]),
        "effect_tolerance": (
            "How large a proven harm may look.",
            lambda one: report["tolerances"][one["metric"]],
        ),
        "claim": ("1: proven better, -1: proven worse, 0: undecided.", lambda one: _CLAIMS[one["claim"]]),
    }
    for suffix, (documentation, value) in values.items():
        family = GaugeMetricFamily(_named(suffix), documentation, labels=["experiment", "metric"])
        for finding in report["findings"]:
            family.add_metric([name, finding["metric"]], float(value(finding)))
        yield family


def _gauge(name: str, documentation: str, experiment: str, value: float) -> Metric:
    family = GaugeMetricFamily(_named(name), documentation, labels=["experiment"])
    family.add_metric([experiment], float(value))
    return family


def _named(name: str) -> str:
    return f"{PREFIX}experiment_{name}"
