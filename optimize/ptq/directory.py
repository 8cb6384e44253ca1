"""A quantised model as a Hugging Face directory, written and read back (names: server/quant/checkpoint.py)."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from optimize.errors import OptimizeError
from optimize.ptq.assemble import Item
from server.models.safetensors_index import INDEX_NAME, SINGLE_NAME, load_index
from server.models.source import ModelSource
from server.quant import checkpoint
from server.quant.formats import LinearFormat, QuantizedWeight

SHARD_BYTES = 4 << 30
_TOKENIZER_FILES = (
    "tokenizer*", "*.jinja", "special_tokens_map.json", "added_tokens.json", "vocab.*", "merges.txt",
    "generation_config.json",
)  # fmt: skip


def write_model(
    items: Iterable[Item], source: ModelSource, out: Path, *, kv_cache: str = "auto", shard_bytes: int = SHARD_BYTES
) -> dict[str, str]:
    """Writes tensors as they come, a shard at a time, then `config.json` and the tokenizer's files.

    Returns the formats' names by layer. What was in `out` before is removed.
    """
    shutil.rmtree(out, ignore_errors=True)
    out.mkdir(parents=True)
    shards = _Shards(out, shard_bytes)
    layers: dict[str, dict[str, Any]] = {}
    names: dict[str, str] = {}
    for name, item in items:
        if isinstance(item, QuantizedWeight):
            layers[name], names[name] = asdict(item.format), item.format.name
            for tensor_name, tensor in tensors_of(name, item).items():
                shards.add(tensor_name, tensor)
        else:
            shards.add(name, item)
    shards.close()
    config = {**source.config, "quantization_config": checkpoint.quantization_config(layers)}
    if "lm_head" in layers:
        config["tie_word_embeddings"] = False  # the embedding is not what the output layer multiplies with any more
    if kv_cache != "auto":
        config["quantization_config"]["kv_cache"] = kv_cache
    (out / "config.json").write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
    for pattern in _TOKENIZER_FILES:
        for file in source.directory.glob(pattern):
            shutil.copyfile(file, out / file.name)
    return names


def read_model(directory: Path) -> Iterator[Item]:
    """What `write_model` wrote. Raises what reading safetensors raises, ValueError for tensors that do not fit."""
    config = json.loads((directory / "config.json").read_text(encoding="utf-8"))
    layers = checkpoint.layers_of(config) or {}
    entries = load_index(directory)
    opened: dict[Path, Any] = {}

    def get(name: str) -> Tensor | None:
        if name not in entries:
            return None
        file = entries[name].file
        if file not in opened:
            opened[file] = safe_open(str(file), framework="pt")
        tensor: Tensor = opened[file].get_tensor(name)
        return tensor

    given: set[str] = set()
    for name, fields in layers.items():
        parts = (checkpoint.VALUES, checkpoint.SCALES, checkpoint.MINIMUMS, checkpoint.INPUT_SCALES)
        values, scales, minimums, inputs = (get(f"{name}.{part}") for part in parts)
        if values is None or scales is None:
            raise ValueError(f"{directory}: layer {name} lacks its weight or weight_scale")
        given |= {f"{name}.{part}" for part in parts}
        yield name, QuantizedWeight(LinearFormat(**fields), values, scales, minimums, inputs)
    for name in entries:
        if name not in given:
            tensor = get(name)
            assert tensor is not None
            yield name, tensor


def tensors_of(name: str, weight: QuantizedWeight) -> dict[str, Tensor]:
    """The stored tensors of a layer by their names."""
    found: Mapping[str, Tensor | None] = {
        checkpoint.VALUES: weight.values,
        checkpoint.SCALES: weight.scales,
        checkpoint.MINIMUMS: weight.minimums,
        checkpoint.INPUT_SCALES: weight.input_scales,
    }
    return {f"{name}.{part}": tensor for part, tensor in found.items() if tensor is not None}


class _Shards:
    """Files of at most about `most` bytes; a model that fits in one has no index."""

    def __init__(self, out: Path, most: int) -> None:
        self._out, self._most = out, most
        self._held: dict[str, Tensor] = {}
        self._size = self._total = 0
        self._written: list[list[str]] = []

    def add(self, name: str, tensor: Tensor) -> None:
        size = tensor.numel() * tensor.element_size()
        if self._held and self._size + size > self._most:
            self._flush()
        self._held[name] = tensor.detach().to("cpu", copy=tensor.device.type == "cpu").contiguous()
        self._size += size
        self._total += size

    def close(self) -> None:
        self._flush()
        count = len(self._written)
        final = [SINGLE_NAME] if count == 1 else [f"model-{i + 1:05d}-of-{count:05d}.safetensors" for i in range(count)]
        for i, name in enumerate(final):
            self._part(i).rename(self._out / name)
        if count > 1:
            weight_map = {tensor: final[i] for i, names in enumerate(self._written) for tensor in names}
            content = {"metadata": {"total_size": self._total}, "weight_map": weight_map}
            (self._out / INDEX_NAME).write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")

    def _flush(self) -> None:
        if not self._held:
            return
        path = self._part(len(self._written))
        try:
            save_file(self._held, path, metadata={"format": "pt"})
        except SafetensorError as error:  # of the system, in its own class and words
            raise OptimizeError(f"{path}: cannot be written: {error}; is the disk full?") from error
        self._written.append(list(self._held))
        self._held, self._size = {}, 0

    def _part(self, index: int) -> Path:
        return self._out / f"part-{index:05d}.safetensors"
