"""GGUF file to a Hugging Face directory (safetensors), streamed tensor by tensor: in float32, or natively, each
tensor in the precision of its own blocks (`server.models.gguf_write`).

llama.cpp stores the query and key rows of the `llama` architecture permuted, because its rotary embedding
rotates neighbouring pairs while Hugging Face's rotates the two halves of a head. The conversion undoes that;
whole rows move, so the same row order applies to quantised blocks.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
from collections.abc import Iterator
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from server.models.errors import ModelSourceError
from server.models.gguf import Bytes, GgufFile
from server.models.gguf_config import generation_config, hf_config
from server.models.gguf_tokenizer import write_tokenizer
from server.models.gguf_write import DEQUANTISED, Form, Output, Progress, Stored, write_weights
from server.quant.checkpoint import quantization_config

CONVERTER_VERSION = 1
RECORD_NAME = "outpace.json"
WEIGHTS_NAME = "model.safetensors"

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


def convert(
    file: GgufFile,
    directory: Path,
    *,
    form: Form = DEQUANTISED,
    same_weights: Path | None = None,
    progress: Progress | None = None,
) -> None:
    """Write `file` as a Hugging Face directory into the existing, empty `directory`.

    `same_weights` is a weights file that another conversion made with the same tensors: linked where that is possible.
    The record `outpace.json` is written last. Raises `ModelSourceError` for what cannot be converted and `OSError`
    where the disk does not take it.
    """
    config = hf_config(file)
    write_tokenizer(file, directory)
    outputs = _outputs(file, config, form)
    _check_shapes(file, outputs, config)
    _write_json(directory / "config.json", _with_layers(config, outputs, form))
    _write_json(directory / "generation_config.json", generation_config(config, file))
    weights = directory / WEIGHTS_NAME
    if same_weights is None or not _linked(same_weights, weights):
        write_weights(file, [] if form.text else outputs, weights, progress or (lambda what, fraction: None))
    _write_json(directory / RECORD_NAME, _record(file, directory, form, outputs))


def lost_line(directory: Path) -> str | None:
    """What a native conversion had to dequantise, and why; None if it kept everything."""
    lost = json.loads((directory / RECORD_NAME).read_text()).get("lost") or {}
    if not lost:
        return None
    each = "; ".join(f"{kind} ({len(names)} tensors, first {names[0]})" for kind, names in sorted(lost.items()))
    return f"stored in float32, because no format of the kernels holds such blocks exactly: {each}"


def converted_shapes(file: GgufFile, form: Form = DEQUANTISED) -> tuple[dict[str, Any], list[Stored]]:
    """What `convert` would write, from the header alone: `config.json` and the tensors.

    Raises `ModelSourceError` for what cannot be converted.
    """
    config = hf_config(file)
    outputs = _outputs(file, config, form)
    _check_shapes(file, outputs, config)
    return _with_layers(config, outputs, form), [part for output in outputs for part in output.stored()]


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


def _outputs(file: GgufFile, config: dict[str, Any], form: Form) -> list[Output]:
    outputs = []
    for tensor in file.tensors.values():
        name = hf_name(tensor.name)
        if name is None:
            if _IGNORED.fullmatch(tensor.name):
                continue
            raise ModelSourceError(f"{file.path}: tensor {tensor.name!r} belongs to no {file.architecture} model")
        order = row_order(file, tensor.name, config)
        outputs.append(Output(name, tensor.shape, tensor, order, form.native))
    present = {output.name: output for output in outputs}
    for bias in _expected_biases(config):
        if bias not in present:
            rows = present.get(bias.removesuffix("bias") + "weight")
            if rows is not None:
                outputs.append(Output(bias, rows.shape[:1], None))
    return outputs


def _expected_biases(config: dict[str, Any]) -> Iterator[str]:
    for layer in range(config["num_hidden_layers"]):
        if config.get("attention_bias"):
            yield from (f"model.layers.{layer}.self_attn.{part}_proj.bias" for part in "qkvo")
        if config.get("mlp_bias"):
            yield from (f"model.layers.{layer}.mlp.{part}_proj.bias" for part in ("gate", "up", "down"))


def _check_shapes(file: GgufFile, outputs: list[Output], config: dict[str, Any]) -> None:
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


def _with_layers(config: dict[str, Any], outputs: list[Output], form: Form) -> dict[str, Any]:
    layers = {o.layer: kept.fields(form.activations) for o in outputs if (kept := o.layout) is not None}
    return config | ({"quantization_config": quantization_config(layers)} if layers else {})


def _linked(source: Path, target: Path) -> bool:
    try:
        os.link(source, target)
    except OSError:  # gone meanwhile, or a file system without links
        return False
    return True


def _record(file: GgufFile, directory: Path, form: Form, outputs: list[Output]) -> dict[str, Any]:
    stat = file.path.stat()
    lost: dict[str, list[str]] = {}
    for output in outputs:
        if output.lost is not None:
            lost.setdefault(output.lost, []).append(output.name)
    return {
        "form": form.recorded(),
        **({"lost": lost} if lost else {}),
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
