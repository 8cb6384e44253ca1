"""The whole server's metrics at one moment, as Prometheus reads them and as `/v1/stats` tells them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import cached_property
from typing import Any

import orjson

from server.telemetry.aliases import alias_families
from server.telemetry.families import PREFIX
from server.telemetry.merge import Family
from server.telemetry.quantiles import SHARES, Sketches, quantile_families, windows_report
from server.telemetry.sketch import RELATIVE_ERROR
from server.telemetry.text_format import text_format
from server.telemetry.windows import WINDOWS, Slot, combined


class Report:
    """`families` of all processes and of the engines, `slots` of all processes; `engines` describes them by arm.

    `model_names` are what clients call the models, by arm: those arms' metrics have aliases.
    """

    def __init__(
        self,
        families: Sequence[Family],
        slots: Sequence[Slot],
        now: float,
        model_names: Mapping[str, str],
        engines: Mapping[str, Mapping[str, Any]],
    ) -> None:
        self._families = families
        self._slots = slots
        self._now = now
        self._model_names = model_names
        self._engines = engines

    @cached_property
    def _sketches(self) -> Sketches:
        return combined(self._slots, self._now)

    def metrics(self) -> bytes:
        """Prometheus' text format 0.0.4."""
        quantiles = quantile_families(self._sketches)
        return text_format([*self._families, *quantiles, *alias_families(self._families, self._model_names)])

    def stats(self) -> bytes:
        """`/v1/stats` as JSON."""
        arms = list(dict.fromkeys([*self._engines, *(arm for arm, _, _ in self._sketches)]))
        values = _by_arm(self._families)
        return orjson.dumps(
            {
                "object": "stats",
                "relative_error": RELATIVE_ERROR,
                "quantiles": list(SHARES),
                "windows": {window.name: {"span_s": window.span_s, "slot_s": window.slot_s} for window in WINDOWS},
                "arms": {
                    arm: {
                        **self._engines.get(arm, {}),
                        "latency": windows_report(self._sketches, arm),
                        "values": values.get(arm, {}),
                    }
                    for arm in arms
                },
            }
        )


def _by_arm(families: Sequence[Family]) -> dict[str, dict[str, Any]]:
    """Counters and gauges by arm and own name; those with a further label as an object by its values."""
    found: dict[str, dict[str, Any]] = {}
    for family in families:
        if family.type not in ("counter", "gauge"):
            continue
        for sample in family.samples:
            labels = dict(sample.labels)
            arm = labels.pop("arm", None)
            if not arm or sample.name.endswith("_created"):
                continue
            name, own = sample.name.removeprefix(PREFIX), found.setdefault(arm, {})
            if labels:
                own.setdefault(name, {})["/".join(labels.values())] = sample.value
            else:
                own[name] = sample.value
    return found
