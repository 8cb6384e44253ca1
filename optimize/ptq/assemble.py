"""The quantised model tensor by tensor, from the original's files: one group of layers in memory at a time."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import Tensor

from optimize.plan import EMBEDDING, HEAD, Plan
from optimize.ptq.convert import Amax, largest, quantize_weight
from optimize.ptq.smooth import Group, Heads, fold, groups, reads_heads, shared, smoothquant_factors
from server.models.loader import Checkpoint
from server.models.source import load_index
from server.quant.formats import QuantizedWeight

Item = tuple[str, Tensor | QuantizedWeight]
POWERS = (0.0, 0.25, 0.5, 0.75, 1.0)
"""Of factors that are tried on the stored format; with 0 there are none."""
_DTYPES = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}


@dataclass(frozen=True, slots=True)
class Calibrated:
    """What calibration found, by layer: factors of the activations' columns, [K] float32, or (SmoothQuant) the
    activations' largest magnitudes, [K], from which factors follow for any α. `moments` are the activations' mean
    squares, [K] float32, by which factors are tried on the stored format."""

    factors: Mapping[str, Tensor] = field(default_factory=dict)
    moments: Mapping[str, Tensor] = field(default_factory=dict)
    magnitudes: Mapping[str, Tensor] = field(default_factory=dict)
    alpha: float = 0.5


class Original:
    """The original's tensors, read when asked for; float32 on `device`. `heads` are its attention's."""

    def __init__(self, directory: Path, device: torch.device, stored: str) -> None:
        self.heads = Heads.of(json.loads((directory / "config.json").read_text(encoding="utf-8")))
        self._checkpoint = Checkpoint(directory, torch.float32, device)
        self._dtypes = {
            name: _DTYPES.get(entry.dtype) if stored == "source" else getattr(torch, stored)
            for name, entry in load_index(directory).items()
        }
        self.names = list(self._dtypes)

    def get(self, name: str) -> Tensor:
        """In float32; of a tied output layer the embedding."""
        if name == HEAD + ".weight" and name not in self._dtypes:
            name = EMBEDDING + ".weight"
        return self._checkpoint.get(name)

    def stored(self, name: str, tensor: Tensor) -> Tensor:
        """`tensor` in the dtype that the one of that name is to be stored in."""
        dtype = self._dtypes.get(name)
        return tensor.to(dtype) if dtype is not None and tensor.is_floating_point() else tensor


def assemble(
    original: Original,
    plan: Plan,
    calibrated: Calibrated,
    *,
    amax: Amax = largest,
    report: Callable[[str, float], None] = lambda what, fraction: None,
) -> Iterator[Item]:
    """(layer name, QuantizedWeight) and (tensor name, Tensor) pairs; every tensor of the original is in one of them."""
    given: set[str] = set()
    linear = [*plan.layers, *(name for name in plan.kept if name + ".weight" in original.names)]
    everything = groups(linear)
    for done, group in enumerate(everything):
        report("quantising", (done + 1) / len(everything))
        present = [name for name in group.layers if name in linear]
        factors = _factors(original, plan, calibrated, group)
        if factors is not None and group.norm is not None:
            norm = group.norm + ".weight"
            weight, factors = fold(original.get(norm), factors)
            given.add(norm)
            yield norm, original.stored(norm, weight)
        for name in present:
            given.add(name + ".weight")
            yield _layer(original, plan, name, factors, group, amax)
    for name in original.names:
        if name not in given and name != "rotary_emb.inv_freq":
            yield name, original.stored(name, original.get(name))


def _layer(original: Original, plan: Plan, name: str, factors: Tensor | None, group: Group, amax: Amax) -> Item:
    weight, form = original.get(name + ".weight"), plan.layers.get(name)
    folded = group.norm is not None
    if form is None:  # in high precision, but what it reads is scaled
        scaled = weight / factors if factors is not None and folded else weight
        return name + ".weight", original.stored(name + ".weight", scaled)
    if factors is None:
        return name, quantize_weight(weight, form, amax=amax)
    if folded:
        return name, quantize_weight(weight / factors, form, amax=amax)
    return name, quantize_weight(weight, form, input_scales=factors, amax=amax)


def _factors(original: Original, plan: Plan, calibrated: Calibrated, group: Group) -> Tensor | None:
    found = shared(calibrated.factors, group, original.heads)
    if found is not None:
        return _tried(original, plan, calibrated, group, found)
    smoothed = [name for name in group.layers if name in calibrated.magnitudes and name in plan.layers]
    if not smoothed:
        return None
    weights = [original.get(name + ".weight") for name in smoothed]
    magnitudes = calibrated.magnitudes[smoothed[0]].to(weights[0].device)
    heads = original.heads if reads_heads(group) else None
    return smoothquant_factors(magnitudes, weights, calibrated.alpha, heads)


def _tried(original: Original, plan: Plan, calibrated: Calibrated, group: Group, factors: Tensor) -> Tensor | None:
    """The power of the factors with the least error of the layers' outputs, None where that is none of them.

    The search for factors looks at each layer alone and at symmetric groups; here layers share them, heads are tied,
    and groups may have a minimum. Errors of columns are taken as independent, weighted by the activations' moments.
    """
    layers = [name for name in group.layers if name in plan.layers and name in calibrated.factors]
    weights = {name: original.get(name + ".weight") for name in layers}
    device = next(iter(weights.values())).device
    factors = factors.to(device)
    if not all(name in calibrated.moments for name in layers):
        return factors

    def error(power: float) -> float:
        scaled = factors**power
        total = 0.0
        for name, weight in weights.items():
            stored = quantize_weight(weight, plan.layers[name], input_scales=scaled)
            wrong = (stored.effective() - weight.float()).square().sum(0)
            total += float(wrong @ calibrated.moments[name].to(device))
        return total

    best = min(POWERS, key=error)
    return factors**best if best else None
