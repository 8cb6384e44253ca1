"""What to try after a refusal: less aggressive formats, and the layers that cost most kept as they were."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from dataclasses import replace

from optimize.evaluate.layers import LayerCost, Sensitivity
from optimize.evaluate.verdict import Number
from optimize.recipe import Recipe

MOST_NAMED = 5
_MUCH = 1.5
"""A layer is named where it costs so many times what the others do on average."""


def advice(
    failed: Sequence[Number], recipe: Recipe | None, layers: Sensitivity | None, drafter: str | None
) -> list[str]:
    """Sentences, the most promising first; none where nothing failed. `recipe` is what made the candidate, if known."""
    names = [number.name for number in failed]
    found: list[str] = []
    if "positions with broken logits" in names:
        found.append("the candidate computes values that are not finite: it is damaged, or its scales overflow")
    if any(name in ("perplexity ratio", "top-1 agreement") for name in names):
        found += [*_kept(layers), *_formats(recipe)]
    doubtful = any(n.value is not None and n.bound is not None and replace(n, bound=None).passed for n in failed)
    if doubtful or "tokens of text" in names:
        found.append("judge by more text (--tokens, --text): a bound gets closer to its value")
    slow = [name.rsplit(" ", 1)[1] for name in names if name.startswith("step time ratio")]
    if slow:
        claimed = () if recipe is None else recipe.gate.faster_at
        faster = [str(tier) for tier in claimed if str(tier) not in slow]
        found.append(
            f"it is no faster at batch {', '.join(slow)}: use a format whose kernels are, "
            f"or claim less with faster_at = [{', '.join(faster)}] (on a CPU faster_at_cpu)"
        )
    if "acceptance ratio" in names:
        found.append(f"distil the drafter again on the candidate: outpace distill CANDIDATE --init {drafter} --out DIR")
    return found


def _kept(layers: Sensitivity | None) -> list[str]:
    """Layers that stand out; where none does, keeping a few will not help."""
    if layers is None or not layers.worst:
        return []
    standing_out = {cost.name for cost in layers.layers if cost.divergence > _MUCH * _others(cost, layers)}
    chosen = [cost for cost in layers.worst if _within(cost, standing_out)][:MOST_NAMED]
    if not chosen:
        return []
    named = ", ".join(f"{cost.name} ({cost.divergence:.2g} nats a token)" for cost in chosen)
    return [f"keep the layers that cost most in high precision ([[layers]] pattern = …, keep = true): {named}"]


def _others(cost: LayerCost, layers: Sensitivity) -> float:
    """Mean of the other layers that cost anything."""
    found = [other.divergence for other in layers.layers if other is not cost and other.divergence > 0]
    return statistics.mean(found) if found else 0.0


def _within(cost: LayerCost, layers: set[str]) -> bool:
    return any(cost.name == layer or cost.name.startswith(f"{layer}.") for layer in layers)


def _formats(recipe: Recipe | None) -> list[str]:
    """Steps down from the recipe's format."""
    if recipe is None:
        return ["use a less aggressive recipe: more bits, smaller groups, or activations as they come"]
    f = recipe
    if f.method == "auto":
        return ["give the search more bits ([auto] bits)", "use recipe int8-weight-only"]
    if f.weights == "int4":
        found = []
        if f.activations != "none":
            found.append('leave activations as they come (activations = "none"; recipe int4-awq)')
        smaller = [size for size in (64, 32) if f.group_size is None or size < f.group_size]
        if smaller:
            found.append(f"use smaller groups (group_size = {smaller[0]}{', or 32' if len(smaller) > 1 else ''})")
        if not f.minimum:
            found.append("give groups a minimum beside the scale (minimum = true; recipe int4-awq-g32)")
        return [*found, "mix 4 and 8 bits (recipe auto)", "use 8 bits (recipe int8-weight-only)"]
    if f.activations != "none":
        found = ['leave activations as they come (activations = "none"; recipe int8-weight-only)']
        return found if f.method == "smoothquant" or f.weights == "fp8" else ["use recipe int8-smoothquant", *found]
    return ["scales of smaller groups (group_size = 128)"] if f.group_size is None else ["serve the original"]
