"""Metrics of several processes as if there were one: counters and histograms add up, and never fall when one ends."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field

from prometheus_client.registry import CollectorRegistry

_CREATED = "_created"
"""Suffix of the time since which a series counts: of several the earliest."""


@dataclass(frozen=True, slots=True)
class Sample:
    """One line of the text format; `labels` are sorted pairs."""

    name: str
    labels: tuple[tuple[str, str], ...]
    value: float


@dataclass(frozen=True, slots=True)
class Family:
    """A metric with its samples, in a form that can be sent to another process."""

    name: str
    type: str
    documentation: str
    samples: list[Sample] = field(default_factory=list)


def snapshot(registry: CollectorRegistry) -> list[Family]:
    """Everything in `registry` now."""
    return [
        Family(
            metric.name,
            metric.type,
            metric.documentation,
            [Sample(s.name, tuple(sorted(s.labels.items())), s.value) for s in metric.samples],
        )
        for metric in registry.collect()
    ]


def merged(snapshots: Iterable[Sequence[Family]]) -> list[Family]:
    """One family per name with the sums of equal samples. Families and samples keep the order of first appearance."""
    families: dict[str, tuple[Family, dict[tuple[str, tuple[tuple[str, str], ...]], float]]] = {}
    for families_of_one in snapshots:
        for family in families_of_one:
            _, values = families.setdefault(family.name, (family, {}))
            for sample in family.samples:
                key = sample.name, sample.labels
                if key not in values:
                    values[key] = sample.value
                elif sample.name.endswith(_CREATED):
                    values[key] = min(values[key], sample.value)
                else:
                    values[key] += sample.value
    return [
        Family(name, family.type, family.documentation, [Sample(*key, value) for key, value in values.items()])
        for name, (family, values) in families.items()
    ]
