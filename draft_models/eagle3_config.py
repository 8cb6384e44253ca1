"""Shape of an EAGLE head, read from the `config.json` of a published one."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from draft_models.eagle_dialects import check_supported, feature_layers, flatten, number, version_of
from server.models.config import ModelConfig, RopeConfig, UnsupportedModelError, rope_from


@dataclass(frozen=True, slots=True)
class Eagle3Config:
    """Shape of the head. `vocab_size` is the target's.

    `feature_layers` are the 0-based target layers whose *outputs* the head reads: three that EAGLE-3 fuses, or the last
    one, as the output layer reads it, for EAGLE-1 (`version`). `norm_before_residual`: the residual stream starts from
    the normalised features instead of the features (some published heads). `share_lm_head`: the checkpoint has no
    output layer; the target's own rows take its place. `target_hidden_size`: the target's width where it is not the
    head's, which then has an embedding of its own.
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
    target_hidden_size: int | None = None
    version: int = 3

    def __post_init__(self) -> None:
        layers = self.feature_layers
        if self.version == 3 and (len(layers) != 3 or list(layers) != sorted(set(layers)) or layers[0] < 0):
            raise UnsupportedModelError(f"EAGLE-3 fuses three rising target layers; feature_layers is {layers}")
        if not 0 < self.draft_vocab_size <= self.vocab_size:
            raise UnsupportedModelError(
                f"draft_vocab_size: {self.draft_vocab_size} is not valid; use 1 to {self.vocab_size}"
            )

    @property
    def target_width(self) -> int:
        """The target's `hidden_size`."""
        return self.target_hidden_size or self.hidden_size

    @property
    def feature_width(self) -> int:
        """Features of a token, before they are fused: F."""
        return len(self.feature_layers) * self.target_width


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
    """An Eagle3Config of a head's `config.json` for a target of `num_target_layers`; `eagle_dialects` says whose.

    UnsupportedModelError: not an EAGLE head, or something about it that is not computed here.
    """
    settings = flatten(raw)
    version = version_of(settings)
    check_supported(settings, version)
    hidden, heads, vocab_size = (number(settings, n) for n in ("hidden_size", "num_attention_heads", "vocab_size"))
    target_hidden = int(settings.get("target_hidden_size") or hidden)
    if version == 1 and target_hidden != hidden:
        raise UnsupportedModelError(f"EAGLE-1 head with target_hidden_size={target_hidden}: only {hidden} is supported")
    last = (num_target_layers - 1,)
    return Eagle3Config(
        hidden_size=hidden,
        num_heads=heads,
        num_kv_heads=int(settings.get("num_key_value_heads") or heads),
        head_dim=int(settings.get("head_dim") or hidden // heads),
        intermediate_size=number(settings, "intermediate_size"),
        vocab_size=vocab_size,
        draft_vocab_size=int((settings.get("draft_vocab_size") if version == 3 else None) or vocab_size),
        rms_norm_eps=float(settings.get("rms_norm_eps", 1e-6)),
        rope=rope_from(settings),
        feature_layers=feature_layers(settings, num_target_layers) if version == 3 else last,
        norm_before_residual=version == 3 and bool(settings.get("norm_before_residual", False)),
        share_lm_head=bool(settings.get("share_lm_head", False)),
        target_hidden_size=None if target_hidden == hidden else target_hidden,
        version=version,
    )
