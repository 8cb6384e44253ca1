"""Shape of an EAGLE-3 head, read from the `config.json` of a published one."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from server.models.config import ModelConfig, RopeConfig, UnsupportedModelError, rope_from


@dataclass(frozen=True, slots=True)
class Eagle3Config:
    """Shape of the head. `hidden_size` is the target's too, since head and target share the embedding.

    `feature_layers` are the three 0-based target layers whose *outputs* are fused. Published heads count layer
    *inputs*: their (2, n / 2, n - 3) are our outputs (1, n / 2 - 1, n - 4). `norm_before_residual`: the residual stream
    starts from the normalised features instead of the features (some published heads). `share_lm_head`: the checkpoint
    has no output layer; the target's own rows take its place.
    """

    hidden_size: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    intermediate_size: int
    vocab_size: int
    draft_vocab_size: int
    rms_norm_eps: float
    rope: RopeConfig
    feature_layers: tuple[int, ...]
    norm_before_residual: bool = False
    share_lm_head: bool = False

    def __post_init__(self) -> None:
        layers = self.feature_layers
        if len(layers) != 3 or list(layers) != sorted(set(layers)) or layers[0] < 0:
            raise UnsupportedModelError(f"EAGLE-3 fuses three rising target layers; feature_layers is {layers}")
        if not 0 < self.draft_vocab_size <= self.vocab_size:
            raise UnsupportedModelError(
                f"draft_vocab_size: {self.draft_vocab_size} is not valid; use 1 to {self.vocab_size}"
            )


def default_feature_layers(num_target_layers: int) -> tuple[int, ...]:
    """Layers whose outputs a head of our own fuses: early, middle and late. UnsupportedModelError under 4 layers."""
    n = num_target_layers
    layers = (2, n // 2, n - 3) if n >= 8 else (0, n // 2, n - 1)
    if len(set(layers)) != 3:
        raise UnsupportedModelError(f"EAGLE-3 needs three layers to fuse; the target has {n}")
    return layers


def config_for(target: ModelConfig, draft_vocab_size: int) -> Eagle3Config:
    """A head of the target's own shape: what published heads of Llama models are."""
    return Eagle3Config(
        hidden_size=target.hidden_size,
        num_heads=target.num_heads,
        num_kv_heads=target.num_kv_heads,
        head_dim=target.head_dim,
        intermediate_size=target.intermediate_size,
        vocab_size=target.vocab_size,
        draft_vocab_size=min(draft_vocab_size, target.vocab_size),
        rms_norm_eps=target.rms_norm_eps,
        rope=target.rope,
        feature_layers=default_feature_layers(target.num_layers),
    )


def parse_config(raw: dict[str, Any], num_target_layers: int) -> Eagle3Config:
    """An Eagle3Config of a head's `config.json` for a target of `num_target_layers`.

    UnsupportedModelError: a head of several layers, with biases, or on a target of another width.
    """
    hidden, heads = int(raw["hidden_size"]), int(raw["num_attention_heads"])
    for name, expected in (("num_hidden_layers", 1), ("attention_bias", False), ("target_hidden_size", hidden)):
        if raw.get(name, expected) != expected:
            raise UnsupportedModelError(f"EAGLE-3 head with {name}={raw[name]!r}: only {expected!r} is supported")
    return Eagle3Config(
        hidden_size=hidden,
        num_heads=heads,
        num_kv_heads=int(raw.get("num_key_value_heads") or heads),
        head_dim=int(raw.get("head_dim") or hidden // heads),
        intermediate_size=int(raw["intermediate_size"]),
        vocab_size=int(raw["vocab_size"]),
        draft_vocab_size=int(raw.get("draft_vocab_size") or raw["vocab_size"]),
        rms_norm_eps=float(raw.get("rms_norm_eps", 1e-6)),
        rope=rope_from(raw),
        feature_layers=_feature_layers(raw, num_target_layers),
        norm_before_residual=bool(raw.get("norm_before_residual", False)),
        share_lm_head=bool(raw.get("share_lm_head", False)),
    )


def _feature_layers(raw: dict[str, Any], n: int) -> tuple[int, ...]:
    """Layer outputs. Files of vLLM and speculators count layer inputs, those of SGLang and SpecForge outputs."""
    outputs = raw.get("feature_layers") or (raw.get("eagle_config") or {}).get("eagle_aux_hidden_state_layer_ids")
    if outputs:
        return tuple(int(i) for i in outputs)
    inputs = raw.get("eagle_aux_hidden_state_layer_ids") or (2, n // 2, n - 3)
    return tuple(int(i) - 1 for i in inputs)
