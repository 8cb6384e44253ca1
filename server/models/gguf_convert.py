"""GGUF file to a Hugging Face directory (float32 safetensors), streamed tensor by tensor.

llama.cpp stores the query and key rows of the `llama` architecture permuted, because its rotary embedding
rotates neighbouring pairs while Hugging Face's rotates the two halves of a head. The conversion undoes that;
whole rows move, so the same row order applies to quantised blocks.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
from numpy.typing import NDArray

from server.models.errors import ModelSourceError
from server.models.gguf import Bytes, GgufFile, GgufTensor, dequantize
from server.models.gguf_config import generation_config, hf_config
from server.models.gguf_tokenizer import write_tokenizer

CONVERTER_VERSION = 1
RECORD_NAME = "outpace.json"
WEIGHTS_NAME = "model.safetensors"
_VALUES_PER_CHUNK = 1 << 21  # 8 MiB of float32 at a time: stays near the caches and bounds the memory

Progress = Callable[[str, float], None]
"""Called as `progress(what, fraction)` with a fraction from 0 to 1."""

_GLOBAL_NAMES = {
    "token_embd.weight": "model.embed_tokens.weight",
    "output_norm.weight": "model.norm.weight",
    "output.weight": "lm_head.weight",
}
_LAYER_NAMES = {
    "attn_norm": "input_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "attn_q_norm": "self_attn.q_norm",
    "attn_k_norm": "self_attn.k_norm",
    "ffn_norm": "post_attention_layernorm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}
_LAYER_PATTERN = re.compile(r"blk\.(\d+)\.(\w+)\.(weight|bias)")
_IGNORED = re.compile(r"rope_freqs\.weight|blk\.\d+\.attn_rot_embd\.weight|blk\.\d+\.attn\.rotary_emb\.inv_freq")


@dataclass(frozen=True, slots=True)
class RawBlocks:
    """A tensor's original quantised blocks, mapped from the GGUF file.

    `data` is uint8 [rows, bytes a row] in the file's row order; `shape` counts values. Row i of the Hugging Face
    tensor is row `row_order[i]` of `data`; None means the orders agree.
    """

    data: Bytes
    type_name: str
    shape: tuple[int, ...]
    row_order: NDArray[np.int64] | None


@dataclass(frozen=True, slots=True)
class _Output:
    """One tensor of the safetensors file; `source` None means zeros (a bias that transformers expects)."""

    name: str
    shape: tuple[int, ...]
    source: GgufTensor | None

    @property
    def num_bytes(self) -> int:
        return prod(self.shape) * 4


def hf_name(gguf_name: str) -> str | None:
    """The Hugging Face name of a GGUF tensor of the Llama family; None if there is none."""
    if gguf_name in _GLOBAL_NAMES:
        return _GLOBAL_NAMES[gguf_name]
    match = _LAYER_PATTERN.fullmatch(gguf_name)
    if match is None or match[2] not in _LAYER_NAMES:
        return None
    return f"model.layers.{match[1]}.{_LAYER_NAMES[match[2]]}.{match[3]}"


def row_order(file: GgufFile, gguf_name: str, config: dict[str, Any]) -> NDArray[np.int64] | None:
    """Which file row each Hugging Face row of this tensor is; None where the orders agree."""
    match = _LAYER_PATTERN.fullmatch(gguf_name)
    if file.architecture not in ("llama", "mistral") or match is None or match[2] not in ("attn_q", "attn_k"):
        return None
    heads = config["num_attention_heads" if match[2] == "attn_q" else "num_key_value_heads"]
    rows = file.tensors[gguf_name].shape[0]
    interleaved = np.arange(rows, dtype=np.int64).reshape(heads, rows // heads // 2, 2)
    return np.ascontiguousarray(interleaved.swapaxes(1, 2)).reshape(-1)


def convert(file: GgufFile, directory: Path, *, progress: Progress | None = None) -> None:
    """Write `file` as a Hugging Face directory into the existing, empty `directory`.

    The record `outpace.json` is written last. Raises `ModelSourceError`
    for what cannot be converted and `OSError` where the disk does not take it.
    """
    config = hf_config(file)
    write_tokenizer(file, directory)
    _write_json(directory / "config.json", config)
    _write_json(directory / "generation_config.json", generation_config(config, file))
    outputs = _outputs(file, config)
    _check_shapes(file, outputs, config)
    _write_weights(file, outputs, config, directory / WEIGHTS_NAME, progress or (lambda what, fraction: None))
    _write_json(directory / RECORD_NAME, _record(file, directory))


def converted_shapes(file: GgufFile) -> tuple[dict[str, Any], dict[str, tuple[int, ...]]]:
    """What `convert` would write, from the header alone: `config.json` and each tensor's shape.

    Raises `ModelSourceError` for what cannot be converted.
    """
    config = hf_config(file)
    outputs = _outputs(file, config)
    _check_shapes(file, outputs, config)
    return config, {output.name: output.shape for output in outputs}


def file_sha256(path: Path) -> str:
    """Hexadecimal SHA-256 of a file's content."""
    with path.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def load_blocks(directory: Path, name: str) -> RawBlocks | None:
    """The original quantised blocks of Hugging Face tensor `name` of a directory converted from GGUF.

    None if the directory was not converted, or the tensor has no counterpart in the file. Raises `ModelSourceError` if
    the GGUF file is gone or has changed.
    """
    return BlockSource.open(directory).blocks(name) if (directory / RECORD_NAME).is_file() else None


class BlockSource:
    """The GGUF file behind a converted directory, opened once for many tensors."""

    def __init__(self, file: GgufFile, config: dict[str, Any]) -> None:
        self._file = file
        self._config = config
        self._names = {name: tensor for tensor in file.tensors if (name := hf_name(tensor)) is not None}

    @classmethod
    def open(cls, directory: Path) -> BlockSource:
        record = json.loads((directory / RECORD_NAME).read_text())
        path = Path(record["source"]["path"])
        if not path.is_file():
            raise ModelSourceError(f"{path}: gone; the quantised blocks of {directory} come from this file")
        if path.stat().st_size != record["source"]["size"]:
            raise ModelSourceError(f"{path}: has changed since {directory} was converted from it")
        return cls(GgufFile(path), json.loads((directory / "config.json").read_text()))

    def names(self) -> list[str]:
        """Hugging Face names of all tensors whose blocks can be had."""
        return list(self._names)

    def blocks(self, name: str) -> RawBlocks | None:
        gguf_name = self._names.get(name)
        if gguf_name is None:
            return None
        tensor = self._file.tensors[gguf_name]
        data = self._file.blocks(gguf_name).reshape(prod(tensor.shape[:-1]), -1)
        return RawBlocks(data, tensor.type_name, tensor.shape, row_order(self._file, gguf_name, self._config))


def _outputs(file: GgufFile, config: dict[str, Any]) -> list[_Output]:
    outputs = []
    for tensor in file.tensors.values():
        name = hf_name(tensor.name)
        if name is None:
            if _IGNORED.fullmatch(tensor.name):
                continue
            raise ModelSourceError(f"{file.path}: tensor {tensor.name!r} belongs to no {file.architecture} model")
        outputs.append(_Output(name, tensor.shape, tensor))
    present = {output.name: output for output in outputs}
    for bias in _expected_biases(config):
        if bias not in present:
            rows = present.get(bias.removesuffix("bias") + "weight")
            if rows is not None:
                outputs.append(_Output(bias, rows.shape[:1], None))
    return outputs


def _expected_biases(config: dict[str, Any]) -> Iterator[str]:
    for layer in range(config["num_hidden_layers"]):
        if config.get("attention_bias"):
            yield from (f"model.layers.{layer}.self_attn.{part}_proj.bias" for part in "qkvo")
        if config.get("mlp_bias"):
            yield from (f"model.layers.{layer}.mlp.{part}_proj.bias" for part in ("gate", "up", "down"))


def _check_shapes(file: GgufFile, outputs: list[_Output], config: dict[str, Any]) -> None:
    hidden, head, inner = config["hidden_size"], config["head_dim"], config["intermediate_size"]
    queries, keys = config["num_attention_heads"] * head, config["num_key_value_heads"] * head
    expected = {
        "model.embed_tokens.weight": (config["vocab_size"], hidden),
        "model.norm.weight": (hidden,),
    }
    for layer in range(config["num_hidden_layers"]):
        at = f"model.layers.{layer}."
        expected[at + "self_attn.q_proj.weight"] = (queries, hidden)
        expected[at + "self_attn.k_proj.weight"] = expected[at + "self_attn.v_proj.weight"] = (keys, hidden)
        expected[at + "self_attn.o_proj.weight"] = (hidden, queries)
        expected[at + "mlp.gate_proj.weight"] = expected[at + "mlp.up_proj.weight"] = (inner, hidden)
        expected[at + "mlp.down_proj.weight"] = (hidden, inner)
        expected[at + "input_layernorm.weight"] = expected[at + "post_attention_layernorm.weight"] = (hidden,)
    shapes = {output.name: output.shape for output in outputs}
    for name, shape in expected.items():
        if shapes.get(name) != shape:
            found = shapes.get(name, "missing")
            raise ModelSourceError(f"{file.path}: tensor for {name} is {found}, should be {shape}")


def _write_weights(
    file: GgufFile, outputs: list[_Output], config: dict[str, Any], path: Path, progress: Progress
) -> None:
    total = sum(output.num_bytes for output in outputs)
    done = 0
    with path.open("wb") as stream:
        stream.write(_safetensors_header(outputs))
        for output in outputs:
            for num_bytes in _write_tensor(file, output, config, stream):
                done += num_bytes
                progress(output.name, done / total)


def _safetensors_header(outputs: list[_Output]) -> bytes:
    """The header of a safetensors file (https://github.com/huggingface/safetensors#format), padded to 8 bytes."""
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    offset = 0
    for output in outputs:
        end = offset + output.num_bytes
        header[output.name] = {"dtype": "F32", "shape": list(output.shape), "data_offsets": [offset, end]}
        offset = end
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text


def _write_tensor(file: GgufFile, output: _Output, config: dict[str, Any], stream: BinaryIO) -> Iterator[int]:
    if output.source is None:
        yield stream.write(bytes(output.num_bytes))
        return
    tensor = output.source
    order = row_order(file, tensor.name, config)
    blocks = file.blocks(tensor.name)
    if blocks.ndim == 1:  # a bias or a norm: its "rows" are single values
        values = dequantize(blocks[None], tensor.type_id)[0]
        yield stream.write((values if order is None else values[order]).tobytes())
        return
    rows_per_chunk = max(1, _VALUES_PER_CHUNK // tensor.shape[-1])
    for start in range(0, len(blocks), rows_per_chunk):
        rows = slice(start, start + rows_per_chunk)
        chunk = dequantize(blocks[rows] if order is None else blocks[order[rows]], tensor.type_id)
        yield stream.write(np.ascontiguousarray(chunk).data)


def _record(file: GgufFile, directory: Path) -> dict[str, Any]:
    stat = file.path.stat()
    return {
        "converter_version": CONVERTER_VERSION,
        "source": {
            "path": str(file.path.resolve()),
            "size": stat.st_size,
            "mtime_ns": stat.st_mtime_ns,
            "sha256": file_sha256(file.path),
            "format": "gguf",
        },
        "weights_size": (directory / WEIGHTS_NAME).stat().st_size,
    }


def _write_json(path: Path, value: Any) -> None:
    path.write_text(json.dumps(value, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
