"""Writes a quantised model of ours for another engine."""

from __future__ import annotations

import re
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor

from optimize.artifact import MANIFEST, ArtifactStore
from optimize.export.awq import AwqFormat
from optimize.export.compressed_tensors import CompressedTensorsFormat
from optimize.export.engines import formats_for, summary, table, why_not
from optimize.export.errors import ExportError
from optimize.export.fold import Folding
from optimize.export.format import Format
from optimize.export.modelopt import ModelOptFormat
from optimize.export.options import ExportOptions
from optimize.export.shards import ShardWriter, replaced, write_json
from optimize.export.source import Source
from server.quant.formats import LinearFormat, QuantizedWeight

_BESIDE = (
    "tokenizer*", "*.jinja", "special_tokens_map.json", "added_tokens.json", "vocab.*", "merges.txt",
    "generation_config.json", "LICENSE*",
)  # fmt: skip
_JOINED = re.compile(r"(.*\.)(?:self_attn\.(?:q|k|v)_proj|mlp\.(?:gate|up)_proj)")
MEGABYTE = 1_000_000
_16BIT = (torch.float16, torch.bfloat16)


def export(options: ExportOptions, say: Callable[[str], None]) -> None:
    """Writes `options.out`; progress and what the reader should know go to `say`.

    Raises ExportError, DamagedError for an artifact that is not as it was written, ModelSourceError for damaged files.
    """
    directory = options.directory()
    if (directory / MANIFEST).is_file():
        ArtifactStore().load(directory)
    source = Source(directory)
    artifact = summary(form for name, form in source.layers.items() if not name.endswith("embed_tokens"))
    names = sorted({form.name for form in source.layers.values()})
    say(f"{len(source.layers)} layers: {', '.join(names)}. Engines, and the formats that each takes of this model:")
    for line in table(artifact):
        say("  " + line)
    chosen = options.format
    if options.engine is not None:
        takes = formats_for(options.engine, artifact)
        if not takes or (chosen is not None and chosen not in takes):
            raise ExportError(why_not(options.engine, chosen, artifact))
        chosen = chosen or takes[0]
    assert chosen is not None  # the options have one of them
    exporter = _Exporter(source, _format(chosen, source), options)
    exporter.check()
    say(f"writing {chosen}" + (f" for {options.engine}" if options.engine else ""))
    for notice in exporter.notices():
        say(notice)
    with replaced(options.out) as temporary:
        exporter.write(temporary)


def _format(name: str, source: Source) -> Format:
    if name == "awq":
        return AwqFormat(source.layers.values())
    if name == "modelopt":
        return ModelOptFormat(source.layers.values(), _half_dtype(source))
    return CompressedTensorsFormat()


def _half_dtype(source: Source) -> torch.dtype:
    """The 16 bits that the model's other tensors are in."""
    norms = (name for name in source.plain if name.endswith("norm.weight"))
    found = next((source.tensor(name).dtype for name in norms), torch.bfloat16)
    return found if found in _16BIT else torch.bfloat16


class _Exporter:
    def __init__(self, source: Source, form: Format, options: ExportOptions) -> None:
        self._source, self._format, self._options = source, form, options
        self._folding = Folding(source)
        self._half = _half_dtype(source) if options.dtype == "auto" else getattr(torch, options.dtype)
        self._quantized: dict[str, LinearFormat] = {}
        self._wide: dict[str, str] = {}

    def check(self) -> None:
        """Finds what becomes of each layer. Raises ExportError for those that cannot be expressed."""
        for name in self._source.layers:
            weight = self._layer(name)
            problem = self._format.problem(name, weight)
            if problem is None:
                self._quantized[name] = replace(weight.format, smooth=False)
            else:
                self._wide[name] = problem
        if self._wide and not self._options.allow_16bit:
            name, why = next(iter(self._wide.items()))
            form = self._source.layers[name].name
            raise ExportError(
                f"{self._format.name} cannot express {len(self._wide)} of {len(self._source.layers)} layers; first "
                f"{name} ({form}): {why}; --allow-16bit stores such layers in 16 bits, another --format may hold them"
            )
        if not self._quantized:
            raise ExportError(f"{self._format.name} can express none of the layers: {next(iter(self._wide.values()))}")
        if self._options.engine not in (None, "transformers"):
            self._check_joined()

    def notices(self) -> list[str]:
        """What the reader should know."""
        found = []
        if self._folding.folded:
            found.append(f"factors of the activations of {len(self._folding.folded)} layers moved into those before")
        if self._wide:
            dtype = str(self._half).removeprefix("torch.")
            first, why = next(iter(self._wide.items()))
            found.append(
                f"{len(self._wide)} layers are stored in {dtype}, first {first}: {why}. "
                "Their activations are not quantised either"
            )
        if self._source.kv_cache not in (None, "auto"):
            found.append(f"the KV cache ({self._source.kv_cache} in the recipe) is a setting of the engine")
        return found

    def write(self, directory: Path) -> None:
        """All files, into an empty directory."""
        shards = ShardWriter(directory, self._options.max_shard_mb * MEGABYTE)
        for name in self._source.plain:
            shards.add({name: self._cast(self._folding.tensor(name, self._source.tensor(name)))})
        for name in self._source.layers:
            weight = self._layer(name)
            if name in self._wide:
                shards.add({f"{name}.weight": _dequantised(weight, self._half)})
            else:
                shards.add(self._format.tensors(name, weight))
        shards.close()
        self._write_settings(directory)
        for pattern in _BESIDE:
            for file in self._source.directory.glob(pattern):
                shutil.copyfile(file, directory / file.name)

    def _write_settings(self, directory: Path) -> None:
        settings = self._format.settings(self._quantized, self._others())
        config = {**self._source.config, "quantization_config": settings.quantization_config}
        if self._options.dtype != "auto":
            config["dtype" if "dtype" in config else "torch_dtype"] = self._options.dtype
        write_json(directory / "config.json", config)
        for name, content in settings.files.items():
            write_json(directory / name, content)
        tokens = {k: config[k] for k in ("bos_token_id", "eos_token_id", "pad_token_id") if config.get(k) is not None}
        write_json(directory / "generation_config.json", tokens)  # the source's own, if it has one, comes after

    def _others(self) -> list[str]:
        """Linear layers that are not quantised."""
        plain = [
            name.removesuffix(".weight")
            for name in self._source.plain
            if name.endswith(".weight") and self._source.num_dimensions(name) == 2
        ]
        others = [name for name in [*plain, *self._wide] if not name.endswith("embed_tokens")]
        if "lm_head" not in [*others, *self._quantized]:
            others.append("lm_head")  # tied to the embedding
        return others

    def _layer(self, name: str) -> QuantizedWeight:
        return self._format.prepare(self._folding.weight(name, self._source.layer(name)))

    def _cast(self, tensor: Tensor) -> Tensor:
        if self._options.dtype == "auto" or not tensor.is_floating_point():
            return tensor
        return tensor.to(self._half)

    def _check_joined(self) -> None:
        """Engines compute q, k and v as one layer, and gate and up: they must be alike."""
        groups: dict[tuple[str, bool], dict[str, LinearFormat | None]] = {}
        for name in [*self._source.layers, *self._others()]:
            found = _JOINED.fullmatch(name)
            if found is not None:
                groups.setdefault((found[1], ".mlp." in name), {})[name] = self._quantized.get(name)
        for members in groups.values():
            if len(set(members.values())) > 1:
                shown = ", ".join(f"{n} ({f.name if f else '16 bits'})" for n, f in members.items())
                raise ExportError(
                    f"{self._options.engine} computes these as one layer and wants one format for them: {shown}; "
                    "a recipe that treats them alike works, or --engine transformers"
                )


def _dequantised(weight: QuantizedWeight, dtype: torch.dtype) -> Tensor:
    """W [O, K] with the factors of the activations in it."""
    result = weight.dequantize()
    return (result if weight.input_scales is None else result * weight.input_scales.float()).to(dtype)
