"""Which project's quantised checkpoint a `config.json` describes."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from server.quant import checkpoint
from server.quant.foreign.awq import AutoAwq
from server.quant.foreign.base import Dialect, ForeignCheckpointError
from server.quant.foreign.compressed_tensors import CompressedTensors
from server.quant.foreign.gptq import Gptq
from server.quant.foreign.modelopt import ModelOpt, read_file

WHAT_WORKS = "awq (AutoAWQ), gptq, compressed-tensors and modelopt work"


def foreign_layers(config: Mapping[str, Any], directory: Path | None = None) -> Dialect | None:
    """The dialect of a checkpoint that another project quantised; None if it is not quantised, or by us.

    `config` is the content of `config.json`; in `directory` lies `hf_quant_config.json`, which older exports of
    ModelOpt have instead. Raises ForeignCheckpointError, naming the field and what works.
    """
    found = config.get("quantization_config") or config.get("compression_config")
    if found is None:
        found = read_file(directory) if directory is not None else None
        if found is None:
            return None
    if not isinstance(found, Mapping):
        raise ForeignCheckpointError(f"quantization_config: {found!r} is not a JSON object")
    method = str(found.get("quant_method", "")).lower().replace("_", "-")
    if method == checkpoint.QUANT_METHOD:
        return None
    if method == "awq":
        return AutoAwq(found)
    if method == "gptq":
        return Gptq(found)
    if method == "compressed-tensors":
        return CompressedTensors(found)
    if method.startswith("modelopt") or _made_by_modelopt(found):
        nested = read_file(directory) if directory is not None and "quant_algo" not in found else None
        return ModelOpt(nested or found)
    raise ForeignCheckpointError(f"quantization_config: quant_method {method!r} is not supported; {WHAT_WORKS}")


def _made_by_modelopt(found: Mapping[str, Any]) -> bool:
    producer = found.get("producer")
    return isinstance(producer, Mapping) and producer.get("name") == "modelopt"
