"""Which kernel runs for which layers, as `/server_info` and the log say it. Never imports torch."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import groupby

DEQUANTISED = "-dequantised"
"""How a path ends that has no low-bit kernel: the weight was dequantised when it was loaded."""


@dataclass(frozen=True, slots=True)
class LayerPaths:
    """Layers that are stored (`format`) and computed (`path`) alike; `layers` are their names, numbers as `*`."""

    layers: list[str]
    num_layers: int
    format: str
    path: str

    @property
    def dequantised(self) -> bool:
        """Whether a quantised weight is computed without a low-bit kernel."""
        return self.path.endswith(DEQUANTISED)


def paths_of(layers: Mapping[str, tuple[str, str]]) -> list[LayerPaths]:
    """Groups of `layers`, name to (format, path); the largest first."""
    found: list[LayerPaths] = []
    for (form, path), items in groupby(sorted(layers, key=lambda name: layers[name]), key=lambda name: layers[name]):
        names = list(items)
        patterns = {".".join("*" if part.isdigit() else part for part in name.split(".")) for name in names}
        found.append(LayerPaths(sorted(patterns), len(names), form, path))
    return sorted(found, key=lambda group: -group.num_layers)


def one_line(groups: Sequence[LayerPaths]) -> str:
    """For the log: `linear layers: 120 int4-g64 torch-dequantised (…), 1 bfloat16 torch (lm_head); 120 of 121 …`."""
    parts = [f"{g.num_layers} {g.format} {g.path} ({', '.join(_short(name) for name in g.layers)})" for g in groups]
    total, without = (sum(g.num_layers for g in some) for some in (groups, [g for g in groups if g.dequantised]))
    note = f"; {without} of {total} have no low-bit kernel here and were dequantised" if without else ""
    return f"linear layers: {', '.join(parts)}{note}"


def _short(name: str) -> str:
    return name.removeprefix("model.layers.*.")
