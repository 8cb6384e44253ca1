"""The shape of a small LM: its target's with fewer layers."""

from __future__ import annotations

from typing import Any

from server.config import ConfigError

LAYER_LISTS = ("layer_types", "no_rope_layers", "mlp_layer_types")
"""Keys of `config.json` with an entry a layer."""
_LAYER_COUNTS = ("num_hidden_layers", "n_layer", "n_layers", "num_layers")
LEAST_LAYERS = 2


def chosen_layers(num_layers: int, wanted: int | None) -> tuple[int, ...]:
    """The target's layers that a small LM of `wanted` (None: a fifth) begins with: the first, the last, and what
    spreads evenly between. Raises ConfigError."""
    count = max(LEAST_LAYERS, round(num_layers / 5)) if wanted is None else wanted
    if not LEAST_LAYERS <= count < num_layers:
        if wanted is None:
            raise ConfigError(f"kind: small-lm keeps at least {LEAST_LAYERS} layers, the target has {num_layers}")
        raise ConfigError(f"layers: {count} is not valid; use {LEAST_LAYERS} to {num_layers - 1}")
    return tuple((2 * i * (num_layers - 1) + count - 1) // (2 * (count - 1)) for i in range(count))


def small_config(raw: dict[str, Any], layers: tuple[int, ...]) -> dict[str, Any]:
    """`config.json` of a small LM of the target's `layers`, stored as bfloat16; `raw` is the target's."""
    num_layers = layer_count(raw)
    small = {key: value for key, value in raw.items() if key not in ("quantization_config", "_name_or_path")}
    for key in _LAYER_COUNTS:
        if key in raw:
            small[key] = len(layers)
    for key in LAYER_LISTS:
        if isinstance(raw.get(key), list) and len(raw[key]) == num_layers:
            small[key] = [raw[key][i] for i in layers]
    if raw.get("max_window_layers") is not None:  # the first so many have no window
        small["max_window_layers"] = sum(i < int(raw["max_window_layers"]) for i in layers)
    small.pop("dtype", None)
    return {**small, "torch_dtype": "bfloat16"}


def layer_count(raw: dict[str, Any]) -> int:
    """The target's number of layers. Raises ConfigError where its configuration does not say it."""
    for key in _LAYER_COUNTS:
        if isinstance(raw.get(key), int):
            return int(raw[key])
    raise ConfigError(f"kind: small-lm needs a target whose config.json says {_LAYER_COUNTS[0]}")
