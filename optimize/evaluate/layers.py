"""Which layers cost most: one at a time of the candidate's takes the base's place, and the text is read again.

What is compared is the divergence of the distributions, base ‖ base with one layer of the candidate, on a sample that
is as large as the time allows.
"""

from __future__ import annotations

import re
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from optimize.evaluate.errors import EvaluateError
from optimize.evaluate.quality import compared
from optimize.evaluate.reader import Reader, steps
from optimize.evaluate.texts import Window
from server.models.base import TargetModel
from server.models.llama import LlamaModel

SAMPLE_WINDOW, MOST_WINDOWS = 64, 16
WORST_LAYERS = 4
"""Of so many the linear layers are looked at one by one."""
_FOR_LAYERS = 0.6
"""Share of the time for whole layers; the rest is for their parts."""
_NUMBER = re.compile(r"(.*?\.\d+)\.")
_LLAMA_PARTS = {
    "qkv": "self_attn.[qkv]_proj",
    "out": "self_attn.o_proj",
    "gate_up": "mlp.[gu]*_proj",
    "down": "mlp.down_proj",
}


@dataclass(frozen=True, slots=True)
class LayerCost:
    """`name` is a pattern for a recipe's `[[layers]]`; `divergence` in nats a token; `whole`: a whole decoder layer."""

    name: str
    divergence: float
    whole: bool


@dataclass(frozen=True, slots=True)
class Sensitivity:
    """Layers in their order, then parts of the worst ones, worst first. `complete`: time sufficed for all layers."""

    num_tokens: int
    layers: tuple[LayerCost, ...]
    parts: tuple[LayerCost, ...]
    complete: bool

    @property
    def worst(self) -> tuple[LayerCost, ...]:
        """Parts where there are some, else layers; worst first, those that cost nothing left out."""
        found = self.parts or tuple(sorted(self.layers, key=lambda cost: -cost.divergence))
        return tuple(cost for cost in found if cost.divergence > 0)


class Swap(Protocol):
    """A base network whose layers can be exchanged for a candidate's."""

    layers: list[str]

    def parts(self, layer: str) -> list[str]:
        """What a layer consists of; none where it is one piece."""

    def swapped(self, name: str) -> Any:
        """A context in which the base computes that layer or part as the candidate does."""


class LlamaSwap:
    """For networks of our own whose layers are objects."""

    def __init__(self, base: LlamaModel, candidate: LlamaModel) -> None:
        self._base, self._candidate = base, candidate
        self.layers = [f"model.layers.{i}" for i in range(len(base.layers))] + ["model.embed_tokens", "lm_head"]

    def parts(self, layer: str) -> list[str]:
        """See Swap.parts."""
        return [f"{layer}.{part}" for part in _LLAMA_PARTS.values()] if layer.startswith("model.layers.") else []

    @contextmanager
    def swapped(self, name: str) -> Iterator[None]:
        """See Swap.swapped."""
        places = self._places(name)
        before = [getattr(owner, field) for owner, _, field in places]
        try:
            for owner, other, field in places:
                setattr(owner, field, getattr(other, field))
            yield
        finally:
            for (owner, _, field), value in zip(places, before, strict=True):
                setattr(owner, field, value)

    def _places(self, name: str) -> list[tuple[Any, Any, str]]:
        if name in ("lm_head", "model.embed_tokens"):
            return [(self._base, self._candidate, "head" if name == "lm_head" else "_table")]
        number, _, part = name.removeprefix("model.layers.").partition(".")
        mine, theirs = self._base.layers[int(number)], self._candidate.layers[int(number)]
        fields = [field for field, pattern in _LLAMA_PARTS.items() if part in ("", pattern)]
        norms = ["input_norm", "post_norm"] if not part else []  # what scales activations may be folded into them
        return [(mine, theirs, field) for field in (*fields, *norms)]


class ModuleSwap:
    """For networks of transformers: linear modules by name, grouped by the number of their decoder layer."""

    def __init__(self, base: nn.Module, candidate: nn.Module) -> None:
        self._base, self._candidate = base, candidate
        theirs = dict(candidate.named_modules())
        self._groups: dict[str, list[str]] = {}
        for name, module in base.named_modules():
            weight = getattr(module, "weight", None)
            if name not in theirs or not isinstance(weight, Tensor) or any(True for _ in module.children()):
                continue
            if weight.is_mkldnn or weight.dim() == 2:
                match = _NUMBER.match(name)
                self._groups.setdefault(match[1] if match else name, []).append(name)
        self.layers = list(self._groups)

    def parts(self, layer: str) -> list[str]:
        """See Swap.parts."""
        names = self._groups[layer]
        return names if len(names) > 1 else []

    @contextmanager
    def swapped(self, name: str) -> Iterator[None]:
        """See Swap.swapped."""
        names = self._groups.get(name, [name])
        before = [self._base.get_submodule(each) for each in names]
        try:
            for each in names:
                self._put(each, self._candidate.get_submodule(each))
            yield
        finally:
            for each, module in zip(names, before, strict=True):
                self._put(each, module)

    def _put(self, name: str, module: nn.Module) -> None:
        parent, _, child = name.rpartition(".")
        setattr(self._base.get_submodule(parent), child, module)


def make_swap(base: TargetModel, candidate: TargetModel) -> Swap | None:
    """None where the networks' layers cannot be exchanged."""
    if isinstance(base, LlamaModel) and isinstance(candidate, LlamaModel):
        return LlamaSwap(base, candidate) if len(base.layers) == len(candidate.layers) else None
    mine, theirs = getattr(base, "net", None), getattr(candidate, "net", None)
    return ModuleSwap(mine, theirs) if isinstance(mine, nn.Module) and isinstance(theirs, nn.Module) else None


def sensitivity(
    base: TargetModel,
    candidate: TargetModel,
    windows: Sequence[Window],
    seconds: float,
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> Sensitivity | None:
    """None where layers cannot be exchanged. Takes about `seconds`."""
    swap = make_swap(base, candidate)
    if swap is None:
        return None
    sample = _spread(windows, MOST_WINDOWS)
    reader = Reader(base, SAMPLE_WINDOW, len(sample) * SAMPLE_WINDOW)
    ends = time.perf_counter() + seconds
    _read(reader, sample[:1])  # the first run may compile
    took = time.perf_counter()
    _read(reader, sample[:1])
    a_window = time.perf_counter() - took
    affordable = int(_FOR_LAYERS * seconds / (len(swap.layers) + 1) / max(a_window, 1e-9))
    search = _Search(reader, swap, sample[: max(1, affordable)], ends)
    layers, complete = search.costs(swap.layers, whole=True, progress=progress)
    worst = sorted(layers, key=lambda cost: -cost.divergence)[:WORST_LAYERS]
    names = [part for cost in worst if cost.divergence > 0 for part in swap.parts(cost.name)]
    parts, _ = search.costs(names, whole=False, progress=lambda done, total: None)
    single = [cost for cost in worst if not swap.parts(cost.name)]
    ordered = sorted([*parts, *single], key=lambda cost: -cost.divergence) if parts else []
    return Sensitivity(sum(w.num_tokens for w in search.sample), tuple(layers), tuple(ordered), complete)


class _Search:
    """What the base says of a sample, to hold against what it says with other layers."""

    def __init__(self, reader: Reader, swap: Swap, sample: Sequence[Window], ends: float) -> None:
        self.reader, self.swap, self.sample, self._ends = reader, swap, sample, ends
        self._base = _read(reader, sample)

    def costs(
        self, names: Sequence[str], *, whole: bool, progress: Callable[[int, int], None]
    ) -> tuple[list[LayerCost], bool]:
        """Of those that there is time for, and whether that is all."""
        found: list[LayerCost] = []
        for name in names:
            if time.perf_counter() > self._ends:
                return found, False
            with self.swap.swapped(name):
                logits = _read(self.reader, self.sample)
            targets = torch.zeros(len(logits), dtype=torch.int64, device=logits.device)
            divergence = float(compared(self._base, logits, targets)[2].mean())
            found.append(LayerCost(name, divergence, whole))
            progress(len(found), len(names))
        return found, True


def _read(reader: Reader, sample: Sequence[Window]) -> Tensor:
    parts = [reader.logits(sample, step) for step in steps(sample, 1 << 30)]
    if not parts:
        raise EvaluateError("layers: there is no text to read")
    return torch.cat(parts)


def _spread(windows: Sequence[Window], count: int) -> list[Window]:
    """Beginnings of windows from all over the text."""
    stride = max(1, len(windows) // count)
    chosen = list(windows[::stride])[:count]
    return [Window(w.document, w.cluster, w.ids[: SAMPLE_WINDOW + 1]) for w in chosen]
