"""Which engine takes which format for which kind of layer. From the engines' loaders, as of their stored sources:

vLLM          `quantization/compressed_tensors`, `modelopt.py` (refuses ModelOpt's INT8 and INT4 layouts), `auto_awq.py`
SGLang        `quantization/compressed_tensors` (packed integers only without zero points), `awq`
TensorRT-LLM  `_torch/modules/linear.py` (FP8 by row, W8A16, W4A16_AWQ; no INT8 activations on its PyTorch path)
transformers  the packages compressed-tensors (any scheme, dequantised) and gptqmodel (AutoAWQ)

Never imports torch.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Protocol

ENGINES = ("vllm", "sglang", "tensorrt-llm", "transformers")
FORMATS = ("compressed-tensors", "awq", "modelopt")
EVERYTHING = ("compressed-tensors",)

KINDS = {
    "fp8+fp8": "fp8",
    "int8+int8": "int8-smoothquant",
    "int8": "int8-weight-only",
    "int4": "int4-awq",
    "int4+int8": "w4a8-awq",
    "fp8": "(fp8 weights only)",
    "int8+int8-group": "(Q8_0 blocks)",
}
"""Kinds of layers, and the recipe that makes them."""

_TAKES: Mapping[str, Mapping[str, tuple[str, ...]]] = {
    "vllm": {
        "fp8+fp8": ("compressed-tensors", "modelopt"),
        "int8+int8": ("compressed-tensors",),
        "int8": ("compressed-tensors",),
        "int4": ("compressed-tensors", "awq"),
        "int4+int8": ("compressed-tensors",),
        "fp8": ("compressed-tensors",),
    },
    "sglang": {
        "fp8+fp8": ("compressed-tensors",),
        "int8+int8": ("compressed-tensors",),
        "int8": ("compressed-tensors",),
        "int4": ("compressed-tensors", "awq"),
        "fp8": ("compressed-tensors",),
    },
    "tensorrt-llm": {"fp8+fp8": ("modelopt",), "int8": ("modelopt",), "int4": ("modelopt",)},
    "transformers": dict.fromkeys(KINDS, EVERYTHING) | {"int4": ("compressed-tensors", "awq")},
}
_NOTES = {
    ("vllm", "int4+int8"): "needs a vLLM release with the scheme CompressedTensorsWNA8Int",
    ("vllm", "fp8+fp8"): "needs a GPU of compute capability 8.9 or higher for FP8 activations",
    ("transformers", "int4"): "awq needs the package gptqmodel",
}
_GROUP_SIZES = {"vllm": (32, 64, 128), "sglang": (32, 64, 128), "tensorrt-llm": (64, 128)}
"""Of the integer kernels for activations in 16 bits; transformers takes any."""


class LayerFormat(Protocol):
    """What is asked of a server.quant.formats.LinearFormat."""

    @property
    def weights(self) -> str:
        """Kind of the weights."""

    @property
    def activations(self) -> str:
        """Kind of the activations."""

    @property
    def group_size(self) -> int | None:
        """Columns that share a scale."""

    @property
    def minimum(self) -> bool:
        """Whether groups have one."""


@dataclass(frozen=True, slots=True)
class Artifact:
    """What an engine's answer depends on. `kinds` and `group_sizes` are those of all quantised layers."""

    kinds: tuple[str, ...]
    group_sizes: tuple[int, ...]
    minimum: bool


def summary(forms: Iterable[LayerFormat]) -> Artifact:
    """Of the formats of all quantised layers."""
    found = list(forms)
    kinds = dict.fromkeys(kind_of(form) for form in found)
    sizes = {form.group_size for form in found if form.group_size is not None}
    return Artifact(tuple(kinds), tuple(sorted(sizes)), any(form.minimum for form in found))


def kind_of(form: LayerFormat) -> str:
    """A key of `KINDS`, or another name that no engine takes."""
    return form.weights + (f"+{form.activations}" if form.activations != "none" else "")


def formats_for(engine: str, artifact: Artifact) -> tuple[str, ...]:
    """Formats in which the engine takes all of the artifact's layers, the best first."""
    table = _TAKES[engine]
    found = [f for f in FORMATS if all(f in table.get(kind, ()) for kind in artifact.kinds)]
    return tuple(f for f in found if _objection(engine, f, artifact) is None)


def why_not(engine: str, form: str | None, artifact: Artifact) -> str:
    """Why the engine does not take the artifact (in that format), and the pairs that work."""
    unknown = [kind for kind in artifact.kinds if not _TAKES[engine].get(kind)]
    if unknown:
        reason = f"{engine} has no layers of kind {', '.join(unknown)}"
    else:
        reason = _why_not_format(engine, form, artifact)
    works = [f"{e} with {f}" for e in ENGINES for f in formats_for(e, artifact)[:1]]
    return f"{reason}; what works: {', '.join(works) if works else 'no engine in the table'}"


def notes(engine: str, artifact: Artifact) -> list[str]:
    """What the engine needs for it."""
    return [note for (e, kind), note in _NOTES.items() if e == engine and kind in artifact.kinds]


def table(artifact: Artifact) -> list[str]:
    """Lines: an engine and the formats it takes."""
    lines = []
    for engine in ENGINES:
        formats = ", ".join(formats_for(engine, artifact)) or "-"
        extra = notes(engine, artifact) if formats != "-" else []
        lines.append(f"{engine:<14}{formats}" + (f"  ({'; '.join(extra)})" if extra else ""))
    return lines


def whole_table() -> list[str]:
    """Lines: recipes by engines."""
    widths = [max(len(recipe) for recipe in KINDS.values()) + 2, 16, *([28] * len(ENGINES))]

    def line(cells: Iterable[str]) -> str:
        return "".join(cell.ljust(width) for cell, width in zip(cells, widths, strict=True)).rstrip()

    rows = [line(("recipe", "layers", *ENGINES))]
    for kind, recipe in KINDS.items():
        rows.append(line((recipe, kind, *(", ".join(_TAKES[e].get(kind, ())) or "-" for e in ENGINES))))
    return rows


def _why_not_format(engine: str, form: str | None, artifact: Artifact) -> str:
    """Of an engine that has all of the kinds."""
    kinds = ", ".join(artifact.kinds)
    if form is None:
        objections = (_objection(engine, f, artifact) for f in FORMATS if _all_in(engine, f, artifact))
        return next((o for o in objections if o), f"{engine} has no one format for layers of kinds {kinds}")
    if _all_in(engine, form, artifact):
        objection = _objection(engine, form, artifact)
        if objection:
            return objection
    return f"{engine} does not take layers of kind {kinds} as {form}"


def _all_in(engine: str, form: str, artifact: Artifact) -> bool:
    return all(form in _TAKES[engine].get(kind, ()) for kind in artifact.kinds)


def _objection(engine: str, form: str, artifact: Artifact) -> str | None:
    sizes = _GROUP_SIZES.get(engine)
    wrong = [size for size in artifact.group_sizes if sizes and size not in sizes]
    if wrong:
        return f"{engine} has no kernels for groups of {wrong[0]} columns ({', '.join(map(str, sizes or ()))} work)"
    if artifact.minimum and engine == "sglang" and form == "compressed-tensors":
        return "sglang takes no zero points in compressed-tensors"
    if artifact.minimum and form == "modelopt":
        return "modelopt has no zero points"
    return None
