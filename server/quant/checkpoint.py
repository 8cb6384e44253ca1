"""Quantised layers in a Hugging Face directory: names of their tensors, and what `config.json` says of them.

    "quantization_config": {"quant_method": "outpace", "version": 1, "layers": {"model.layers.0.mlp.down_proj":
        {"weights": "int4", "activations": "none", "group_size": 64, "minimum": true, "smooth": false}, …}}

A layer NAME has `NAME.weight` (the stored values), `NAME.weight_scale`, and where its format has them
`NAME.weight_min` and `NAME.input_scale`. Layers that are not listed are stored as they always are. Never imports torch.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

QUANT_METHOD = "outpace"
VERSION = 1
VALUES, SCALES, MINIMUMS, INPUT_SCALES = "weight", "weight_scale", "weight_min", "input_scale"


def quantization_config(layers: Mapping[str, Mapping[str, Any]]) -> dict[str, Any]:
    """What `config.json` says; `layers` maps names to the fields of their LinearFormat."""
    return {"quant_method": QUANT_METHOD, "version": VERSION, "layers": {k: dict(v) for k, v in layers.items()}}


def layers_of(config: Mapping[str, Any]) -> dict[str, dict[str, Any]] | None:
    """Layers that a `config.json` lists, None if it is no checkpoint of this kind.

    Raises ValueError for a version that is not known.
    """
    found = config.get("quantization_config")
    if not isinstance(found, Mapping) or found.get("quant_method") != QUANT_METHOD:
        return None
    if found.get("version") != VERSION:
        raise ValueError(f"quantization_config: version {found.get('version')!r} is not known; this reads {VERSION}")
    return {str(name): dict(fields) for name, fields in found["layers"].items()}
