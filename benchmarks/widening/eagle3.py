"""An EAGLE-3 head of a larger shape that drafts for a widened target what the small head drafts for the small one."""

from __future__ import annotations

from dataclasses import asdict, dataclass, replace
from typing import Any

import torch
from torch import Tensor

from benchmarks.widening.geometry import Widening, check_shapes, widened_eps, widened_theta
from benchmarks.widening.llama import project, spread
from draft_models.eagle3_config import Eagle3Config
from draft_models.eagle3_weights import TENSOR_NAMES, Eagle3Weights
from server.models.config import ModelConfig
from server.models.errors import ModelSourceError

_FIELDS = {name: field for field, name in TENSOR_NAMES.items()}


def widened_head_config(small: Eagle3Config, target: ModelConfig, c: float, draft_vocab_size: int) -> Eagle3Config:
    """The head for a widened `target`, with its dimensions; `c` is the last coordinate of the target's tokens.

    Its draft vocabulary has `draft_vocab_size` rows, or as many as the small head if that has more. ModelSourceError:
    no room, or `norm_before_residual`, whose norm's weights would have to be turned with the stream.
    """
    if small.norm_before_residual:
        raise ModelSourceError("an EAGLE-3 head with norm_before_residual cannot be widened")
    wide = replace(
        small,
        hidden_size=target.hidden_size,
        num_heads=target.num_heads,
        num_kv_heads=target.num_kv_heads,
        head_dim=target.head_dim,
        intermediate_size=target.intermediate_size,
        vocab_size=target.vocab_size,
        draft_vocab_size=min(max(draft_vocab_size, small.draft_vocab_size), target.vocab_size),
        share_lm_head=False,
    )
    check_shapes(small, wide)
    rope = replace(small.rope, theta=widened_theta(small.rope.theta, small, wide))
    return replace(wide, rms_norm_eps=widened_eps(small.rms_norm_eps, small, wide, c), rope=rope)


def head_config_json(c: Eagle3Config) -> dict[str, Any]:
    """`config.json` contents of a head, as `eagle3_config.parse_config` reads them."""
    return {
        "architectures": ["LlamaForCausalLMEagle3"],
        "hidden_size": c.hidden_size,
        "num_hidden_layers": 1,
        "num_attention_heads": c.num_heads,
        "num_key_value_heads": c.num_kv_heads,
        "head_dim": c.head_dim,
        "intermediate_size": c.intermediate_size,
        "vocab_size": c.vocab_size,
        "draft_vocab_size": c.draft_vocab_size,
        "rms_norm_eps": c.rms_norm_eps,
        "rope_theta": c.rope.theta,
        "rope_scaling": asdict(c.rope)["scaling"] or None,
        "feature_layers": list(c.feature_layers),
        "norm_before_residual": c.norm_before_residual,
    }


@dataclass(frozen=True, slots=True)
class WidenedHead:
    """Tensors by their published names; `weights` are the small head's, in float32 on the device of the work."""

    small: Eagle3Config
    large: Eagle3Config
    weights: Eagle3Weights
    maps: Widening
    dtype: torch.dtype

    def has(self, name: str) -> bool:
        """Whether there is a tensor of that name."""
        return name in _FIELDS or name in ("d2t", "t2d")

    def get(self, name: str) -> Tensor:
        """The tensor. Raises KeyError for a name that a head does not have."""
        w, maps = self.weights, self.maps
        if name in ("d2t", "t2d"):
            return self._vocabulary_map(name)
        field = _FIELDS[name]
        if field == "fc":
            return self._fuse()
        if field == "lm_head":
            return maps.head(w.lm_head, w.norm, self.large.draft_vocab_size, self.dtype)
        if field == "norm":
            return maps.final_norm(self.dtype)
        if not field.endswith("_proj"):
            return torch.ones(self.large.hidden_size, dtype=self.dtype, device=w.fc.device)
        kind, weight = field.removesuffix("_proj"), getattr(w, field)
        if kind in ("q", "k", "v"):
            of_token, of_features = weight.chunk(2, dim=1)
            halves = [maps.reads(of_token, w.input_layernorm), maps.reads(of_features, w.hidden_norm)]
            return spread(maps, kind, torch.cat(halves, dim=1), self.dtype)
        norm = w.post_attention_layernorm if kind in ("gate", "up") else None
        return project(maps, kind, weight, norm, self.dtype)

    def _fuse(self) -> Tensor:
        """[H, 3 H]: turned on both sides; the last coordinate comes from the first of the three layers."""
        parts = self.weights.fc.split(self.small.hidden_size, dim=1)
        wide = torch.cat([self.maps.writes(part) @ self.maps.basis.T for part in parts], dim=1)
        wide[-1] = 0.0
        wide[-1, self.large.hidden_size - 1] = 1.0
        return wide.to(self.dtype)

    def _vocabulary_map(self, name: str) -> Tensor:
        """Rows beyond the small head's name the last of the target's ids that it can not draft."""
        ids = self.weights.target_ids
        free = torch.ones(self.large.vocab_size, dtype=torch.bool, device=ids.device).index_fill_(0, ids, False)
        added = self.large.draft_vocab_size - len(ids)
        others = free.nonzero().squeeze(1)
        ids = torch.cat([ids, others[len(others) - added :]])
        if name == "d2t":
            return ids - torch.arange(len(ids), device=ids.device)
        return torch.zeros_like(free).index_fill_(0, ids, True)
