"""Models in low precision without calibration, for measuring: weights rounded to nearest as they are made.

    python benchmarks/quantised.py FORMAT [--lm-head FORMAT] [--head FORMAT] [options of outpace bench]

is `outpace bench` on such a model; FORMAT is one of FORMATS. The model is a shape (`--random-weights SHAPE`) or
`--model widened:NAME` (benchmarks/widen.py, in the shape of `--shape`); `--draft-model random-head` is an EAGLE-3 head
of the target's shape with random weights, `--head` its format. Each row has a scale, its largest magnitude by the
format's limit, in groups of 128 where the format has groups. What the text is worth is not measured here.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import zlib
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from benchmarks import omp  # noqa: F401  before torch

# isort: split

import torch
from torch import Tensor

from benchmarks.widen import PREFIX, Widened
from benchmarks.widening.eagle3 import head_config_json
from draft_models.eagle3_config import config_for
from draft_models.eagle3_config import parse_config as parse_head
from draft_models.eagle3_weights import TENSOR_NAMES, random_weights, weight_shapes
from optimize.ptq.convert import quantize_weight
from optimize.recipe import LayerFormat
from server.bench import engine as bench_engine
from server.models.config import parse_config
from server.models.gguf_write import DEQUANTISED
from server.models.loader import Tensors, tensors_of
from server.models.random_weights import llama_shapes, llama_weights, random_source
from server.models.shapes import RANDOM
from server.models.source import ModelSource
from server.quant.checkpoint import SCALES, VALUES, quantization_config
from server.quant.formats import LinearFormat, QuantizedWeight

GROUP = 128
FORMATS: dict[str, LinearFormat | None] = {
    "bf16": None,
    "fp8": LinearFormat("fp8", "fp8"),
    "fp8-weights": LinearFormat("fp8"),
    "int8": LinearFormat("int8", "int8"),
    "int8-weights": LinearFormat("int8"),
    "int4": LinearFormat("int4", group_size=GROUP),
    "w4a8": LinearFormat("int4", "int8", GROUP),
}
RANDOM_HEAD = "random-head"
DRAFT_VOCABULARY = 32_000
Make = Callable[[torch.dtype, torch.device], Tensors]


class Rounded:
    """Tensors by name as a quantised checkpoint holds them: `formats` by layer, the rest is `made`'s.

    A layer is rounded when it is asked for; one at a time is kept, for its scales.
    """

    def __init__(
        self, formats: Mapping[str, LinearFormat], shapes: Mapping[str, tuple[int, ...]], made: Tensors | None
    ) -> None:
        """`made` None: on torch's `meta` device, where there are shapes only."""
        self._formats, self._shapes, self._made = formats, shapes, made
        self._latest: tuple[str, QuantizedWeight] | None = None

    def has(self, name: str) -> bool:
        """Whether there is a tensor of that name."""
        layer, _, part = name.rpartition(".")
        return (layer in self._formats and part in (VALUES, SCALES)) or name in self._shapes

    def get(self, name: str) -> Tensor:
        """The tensor as it is stored."""
        layer, _, part = name.rpartition(".")
        if layer not in self._formats or part not in (VALUES, SCALES):
            return self._plain(name)
        if self._latest is None or self._latest[0] != layer:
            self._latest = layer, rounded(self._plain(f"{layer}.{VALUES}"), self._formats[layer])
        found = self._latest[1]
        return found.values if part == VALUES else found.scales

    def _plain(self, name: str) -> Tensor:
        if self._made is None:
            return torch.empty(self._shapes[name], dtype=torch.bfloat16, device="meta")
        return self._made.get(name)


def rounded(weight: Tensor, form: LinearFormat) -> QuantizedWeight:
    """W [O, K] to nearest; on the `meta` device its shapes."""
    if not weight.is_meta:
        return quantize_weight(weight, LayerFormat(form.weights, form.activations, form.group_size, form.minimum))
    rows, columns = weight.shape
    dtype = {"fp8": torch.float8_e4m3fn, "int8": torch.int8, "int4": torch.uint8}[form.weights]
    values = torch.empty(rows, columns // (2 if form.weights == "int4" else 1), dtype=dtype, device="meta")
    scales = (rows,) if form.group_size is None else (rows, columns // form.group_size)
    return QuantizedWeight(form, values, torch.empty(scales, device="meta"))


@dataclass(frozen=True)
class Quantised:
    """Finds models for `build_engine` as `find` does, target (`form`, `lm_head`) and EAGLE-3 head (`head`) rounded."""

    find: Callable[[str], ModelSource]
    form: LinearFormat | None
    lm_head: LinearFormat | None = None
    head: LinearFormat | None = None
    target: str = ""
    """What RANDOM_HEAD drafts for."""

    def __call__(self, name: str) -> ModelSource:
        """Raises what `find` raises."""
        if name == RANDOM_HEAD:
            return self._random_head()
        source = self.find(name)
        if "draft_vocab_size" in source.config:
            shapes = _head_shapes(source.config, parse_config(self.find(self.target).config).num_layers)
            read: Make = source.tensors or (lambda dtype, device: tensors_of(source, device, dtype))
            return _made(source, _formats(shapes, self.head, self.head), shapes, read)
        config = parse_config(source.config)
        drawn = source.kind == "random"
        make: Make = source.tensors or (
            lambda dtype, device: llama_weights(config, dtype, device) if drawn else tensors_of(source, device, dtype)
        )
        shapes = llama_shapes(config)
        return _made(source, _formats(shapes, self.form, self.lm_head), shapes, make)

    def _random_head(self) -> ModelSource:
        target = parse_config(self.find(self.target).config)
        config = config_for(target, DRAFT_VOCABULARY)

        def tensors(dtype: torch.dtype, device: torch.device) -> Tensors:
            return _State(random_weights(config, 0, device, dtype).state_dict())

        raw = head_config_json(config)
        shapes = _head_shapes(raw, target.num_layers)
        source = ModelSource(Path(os.devnull) / RANDOM_HEAD, RANDOM_HEAD, raw, "made", tensors)
        return _made(source, _formats(shapes, self.head, self.head), shapes, tensors)


@dataclass(frozen=True)
class _State:
    """Implements server.models.loader.Tensors for tensors that are there."""

    tensors: Mapping[str, Tensor]

    def has(self, name: str) -> bool:
        """Whether there is a tensor of that name."""
        return name in self.tensors

    def get(self, name: str) -> Tensor:
        """The tensor. Raises KeyError."""
        return self.tensors[name]


def _head_shapes(raw: dict[str, Any], num_target_layers: int) -> dict[str, tuple[int, ...]]:
    config = parse_head(raw, num_target_layers)
    shapes = {TENSOR_NAMES[field]: size for field, size in weight_shapes(config).items()}
    return {**shapes, "d2t": (config.draft_vocab_size,), "t2d": (config.vocab_size,)}


def _formats(
    shapes: Mapping[str, tuple[int, ...]], form: LinearFormat | None, lm_head: LinearFormat | None
) -> dict[str, LinearFormat]:
    """Of every matrix but the embedding, by layer."""
    found: dict[str, LinearFormat] = {}
    for name, size in shapes.items():
        layer = name.removesuffix(".weight")
        wanted = lm_head if layer == "lm_head" else form
        if len(size) == 2 and "embed_tokens" not in name and wanted is not None:
            found[layer] = wanted
    return found


def _made(
    source: ModelSource, formats: dict[str, LinearFormat], shapes: Mapping[str, tuple[int, ...]], make: Make
) -> ModelSource:
    """The source with those layers rounded; its directory is nobody's and names it where costs are cached."""
    if not formats:
        return source
    raw = source.config | {"quantization_config": quantization_config({n: asdict(f) for n, f in formats.items()})}

    def tensors(dtype: torch.dtype, device: torch.device) -> Tensors:
        return Rounded(formats, shapes, None if device.type == "meta" else make(dtype, device))

    identity = zlib.crc32(json.dumps([str(source.directory), raw["quantization_config"]], sort_keys=True).encode())
    nowhere = Path(os.devnull) / f"{source.directory.name}-{identity:08x}"
    return ModelSource(nowhere, source.name, raw, "made", tensors)


def find_shape(name: str, shape: str = "llama-3.1-8b") -> ModelSource:
    """`random:SHAPE`, or a widened model of that shape."""
    return random_source(name.removeprefix(RANDOM)) if name.startswith(RANDOM) else Widened(shape)(name)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("format", choices=FORMATS)
    parser.add_argument("--lm-head", choices=FORMATS, default="bf16", help="of the output layer")
    parser.add_argument("--head", choices=FORMATS, default="bf16", help="of the EAGLE-3 head's linear layers")
    parser.add_argument("--shape", default="llama-3.1-8b", help=f"of {PREFIX}NAME")
    args, rest = parser.parse_known_args()
    named = argparse.ArgumentParser(add_help=False)
    named.add_argument("--random-weights")
    named.add_argument("--model")
    known, _ = named.parse_known_args(rest)
    target = RANDOM + known.random_weights if known.random_weights else known.model
    forms = FORMATS[args.format], FORMATS[args.lm_head], FORMATS[args.head]
    found = Quantised(lambda name: find_shape(name, args.shape), *forms, target or "")
    bench_engine.find = lambda spec, form=DEQUANTISED: found(spec)
    from server.cli import main as outpace

    sys.argv = ["outpace", "bench", *rest]
    return outpace()


if __name__ == "__main__":
    sys.exit(main())
