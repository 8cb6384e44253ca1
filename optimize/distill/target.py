"""The target as it will be served: the one place that says in which form it writes, teaches and judges.

Corpus, training and evaluation take the network from `Served`, loaded by the server's own loader in the server's own
dtype. A quantised checkpoint is a MODEL like any other, so its drafter learns from what the quantised network says: the
teacher calls the network's own linear layers, whatever they hold.

The server's forward pass reads pages; a teacher makes a dense pass over whole rows with the same weights.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor

from optimize.distill.documents_attention import attend
from optimize.distill.options import DistillOptions
from optimize.distill.packing import Batch
from server.config import EngineConfig
from server.models.base import TargetModel
from server.models.llama import Layer, LlamaModel
from server.models.loader import load_source, pick_device, pick_dtype
from server.models.rope import rotate_
from server.models.source import ModelSource


@dataclass(frozen=True, slots=True)
class Served:
    """The target with the settings that change what it computes."""

    options: DistillOptions
    source: ModelSource

    @property
    def device(self) -> torch.device:
        """Where it runs."""
        return pick_device(self.options.device)

    def network(self, max_positions: int) -> TargetModel:
        """Loads it, for `max_positions` positions."""
        dtype = pick_dtype(self.options.dtype, self.device)
        return load_source(self.source, self.device, dtype, max_positions)

    def engine_config(self, **limits: Any) -> EngineConfig:
        """Settings of an engine that writes with it, without drafts; `limits` are fields of EngineConfig."""
        o = self.options
        # Training reads the weights themselves, out of the same directory.
        plain = EngineConfig(model=o.model, weights="dequantised", drafter="none", max_draft_tokens=0)
        return replace(plain, device=o.device, dtype=o.dtype, **limits)


class Teacher(Protocol):
    """What losses and evaluation ask of the target: its distributions, without gradients."""

    device: torch.device
    vocab_size: int

    def hidden(self, batch: Batch) -> tuple[Tensor, Tensor]:
        """Features [B, L, F] that the student reads (F may be 0) and what the output layer reads, [B, L, H]."""

    def logits(self, normed: Tensor) -> Tensor:
        """[N, H] -> float32 [N, V]."""


def teacher_of(model: TargetModel) -> Teacher:
    """The teacher of a loaded target that gives distributions only. Raises UnsupportedModelError."""
    if isinstance(model, LlamaModel):
        return LlamaTeacher(model, ())
    from optimize.distill.transformers_lm import TransformersTeacher  # heavy import, only when needed

    return TransformersTeacher(model)


class LlamaTeacher:
    """A LlamaModel as teacher; the outputs of `feature_layers` are its features."""

    def __init__(self, model: LlamaModel, feature_layers: tuple[int, ...]) -> None:
        self.model, self.feature_layers = model, feature_layers
        self.device, self.vocab_size = model.device, model.vocab_size

    @torch.no_grad()
    def hidden(self, batch: Batch) -> tuple[Tensor, Tensor]:
        """Features [B, L, F * H] as LlamaModel.forward gives them, and what the output layer reads, [B, L, H]."""
        model, (rows, length) = self.model, batch.ids.shape
        x = F.embedding(batch.ids.flatten(), model.embedding)
        rotation = model.rotations[batch.positions.flatten()].unsqueeze(1)
        masks = _Masks(batch)
        features = []
        for i, layer in enumerate(model.layers):
            x = self._attention(layer, x, rotation, masks).add_(x)
            gate, up = layer.gate_up(layer.post_norm(x)).chunk(2, dim=-1)
            x = layer.down(F.silu(gate).mul_(up)).add_(x)
            if i in self.feature_layers:
                features.append(x)
        fused = torch.cat(features, dim=-1) if features else x[:, :0]
        return fused.view(rows, length, fused.shape[-1]), model.norm(x).view(rows, length, -1)

    @torch.no_grad()
    def logits(self, normed: Tensor) -> Tensor:
        """[N, H] -> float32 [N, V]."""
        return self.model.head(normed).float()

    def _attention(self, layer: Layer, x: Tensor, rotation: Tensor, masks: _Masks) -> Tensor:
        c = self.model.config
        qkv = layer.qkv(layer.input_norm(x)).view(x.shape[0], c.num_heads + 2 * c.num_kv_heads, c.head_dim)
        qk = qkv[:, : c.num_heads + c.num_kv_heads]
        if layer.q_norm is not None and layer.k_norm is not None:
            qk[:, : c.num_heads] = layer.q_norm(qk[:, : c.num_heads])
            qk[:, c.num_heads :] = layer.k_norm(qk[:, c.num_heads :])
        if layer.rotates:
            rotate_(qk, rotation)
        parts = (c.num_heads, c.num_kv_heads, c.num_kv_heads)
        if x.is_cuda and x.dtype != torch.float32 and masks.whole(layer.window):
            query, key, value = (part.contiguous() for part in qkv.split(parts, dim=1))
            return layer.out(attend(query, key, value, masks.batch, c.head_dim**-0.5).flatten(1))
        mask = masks.of(layer.window)
        by_row = qkv.view(len(mask), -1, *qkv.shape[1:]).transpose(1, 2)  # [B, heads + 2 kv_heads, L, D]
        query, key, value = by_row.split(parts, dim=1)
        groups = c.num_heads // c.num_kv_heads
        key, value = (t.repeat_interleave(groups, dim=1) for t in (key, value))
        mixed = F.scaled_dot_product_attention(query, key, value, attn_mask=mask, scale=c.head_dim**-0.5)
        return layer.out(mixed.transpose(1, 2).reshape(x.shape[0], -1))


class _Masks:
    """Which tokens a batch's tokens see in layers of different windows, made when asked for."""

    def __init__(self, batch: Batch) -> None:
        self.batch = batch
        self._made: dict[int | None, Tensor] = {}

    def whole(self, window: int | None) -> bool:
        """Whether a token sees all of its document before it."""
        return window is None or window >= self.batch.longest

    def of(self, window: int | None) -> Tensor:
        """[B, 1, L, L] bool."""
        if window not in self._made:
            sees, length = self.batch.sees(), self.batch.ids.shape[1]
            self._made[window] = (sees if window is None else sees & within(length, window, sees.device))[:, None]
        return self._made[window]


def within(length: int, window: int, device: torch.device) -> Tensor:
    """[L, L] bool: the last `window` tokens."""
    at = torch.arange(length, device=device)
    return at[:, None] - at < window
