"""P50, P95 and P99 per arm, metric and window: as Prometheus gauges and as JSON, from the slots of all processes."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from server.telemetry.families import PREFIX
from server.telemetry.merge import Family, Sample
from server.telemetry.sketch import RELATIVE_ERROR, Sketch
from server.telemetry.windows import WINDOWS

SHARES = (0.5, 0.95, 0.99)
_NAMES = {
    "ttft": "time_to_first_token",
    "itl": "inter_token_latency",
    "step_gap": "step_gap",
    "tpot": "time_per_output_token",
    "e2e": "e2e_request_latency",
    "queue": "request_queue_time",
}

Sketches = Mapping[tuple[str, str, str], Sketch]
"""By (arm, metric, window)."""


def quantile_families(sketches: Sketches) -> list[Family]:
    """`outpace_<metric>_quantile_seconds{arm, window, quantile}`; a window without values has no series."""
    families = {
        metric: Family(
            f"{PREFIX}{name}_quantile_seconds",
            "gauge",
            f"Quantiles of {PREFIX}{name}_seconds over a window, each within {RELATIVE_ERROR:.0%} of the true one.",
        )
        for metric, name in _NAMES.items()
    }
    for (arm, metric, window), sketch in sketches.items():
        values = sketch.quantiles(SHARES)
        if values is None:
            continue
        family = families[metric]
        for share, value in zip(SHARES, values, strict=True):
            labels = ("arm", arm), ("quantile", str(share)), ("window", window)
            family.samples.append(Sample(family.name, labels, value))
    return list(families.values())


def windows_report(sketches: Sketches, arm: str) -> dict[str, dict[str, Any]]:
    """`{window: {metric: {count, mean_s, p50_s, p95_s, p99_s}}}` of one arm; null where nothing was measured."""
    empty = Sketch()
    return {
        window.name: {metric: _summary(sketches.get((arm, metric, window.name), empty)) for metric in _NAMES}
        for window in WINDOWS
    }


def _summary(sketch: Sketch) -> dict[str, Any]:
    count, values = sketch.count, sketch.quantiles(SHARES)
    quantiles = {f"p{share * 100:g}_s": None if values is None else values[i] for i, share in enumerate(SHARES)}
    return {"count": count, "mean_s": sketch.total / count if count else None, **quantiles}
