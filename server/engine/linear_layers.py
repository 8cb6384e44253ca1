"""Which kernel runs for which layers, as `/server_info` and the log say it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import groupby

from server.engine.messages import LayerPaths
from server.models.base import TargetModel
from server.quant.dequantized import DEQUANTISED


def linear_layers(model: TargetModel, plain_path: str) -> list[LayerPaths]:
    """Groups of a network's layers, none if it is not our own; `plain_path` computes unquantised ones on a GPU."""
    named: dict[str, tuple[str, str]] = getattr(model, "layer_paths", dict)()
    return grouped({n: (form, plain_path if path == "torch" else path) for n, (form, path) in named.items()})


def grouped(layers: Mapping[str, tuple[str, str]]) -> list[LayerPaths]:
    """Groups of `layers`, name to (format, path); the largest first."""
    found: list[LayerPaths] = []
    for (form, path), items in groupby(sorted(layers, key=lambda name: layers[name]), key=lambda name: layers[name]):
        names = list(items)
        patterns = {".".join("*" if part.isdigit() else part for part in name.split(".")) for name in names}
        found.append(LayerPaths(sorted(patterns), len(names), form, path, DEQUANTISED in path))
    return sorted(found, key=lambda group: -group.num_layers)


def one_line(groups: Sequence[LayerPaths]) -> str:
    """For the log: `linear layers: 120 int4-g64 torch-dequantised (…), 1 bfloat16 torch (lm_head); 120 of 121 …`."""
    parts = [f"{g.num_layers} {g.format} {g.path} ({', '.join(_short(name) for name in g.layers)})" for g in groups]
    total, without = (sum(g.num_layers for g in some) for some in (groups, [g for g in groups if g.dequantised]))
    note = f"; {without} of {total} have no low-bit kernel here and were dequantised" if without else ""
    return f"linear layers: {', '.join(parts)}{note}"


def _short(name: str) -> str:
    return name.removeprefix("model.layers.*.")
