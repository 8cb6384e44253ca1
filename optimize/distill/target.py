"""The target as teacher: a dense pass over whole rows, where the server's own forward pass reads pages."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from optimize.distill.packing import Batch
from server.models.llama import Layer, LlamaModel
from server.models.rope import rotate_


class Teacher:
    """Hidden states and logits of a LlamaModel, without gradients."""

    def __init__(self, model: LlamaModel, feature_layers: tuple[int, ...]) -> None:
        self.model, self.feature_layers = model, feature_layers

    @torch.no_grad()
    def hidden(self, batch: Batch) -> tuple[Tensor, Tensor]:
        """Features [B, L, F * H] as LlamaModel.forward gives them, and what the output layer reads, [B, L, H]."""
        model, (rows, length) = self.model, batch.ids.shape
        x = F.embedding(batch.ids.flatten(), model.embedding)
        rotation = model.rotations[batch.positions.flatten()].unsqueeze(1)
        sees = batch.sees()
        masks: dict[int | None, Tensor] = {None: sees[:, None]}
        features = []
        for i, layer in enumerate(model.layers):
            if layer.window not in masks:
                masks[layer.window] = (sees & _within(length, layer.window or length, sees.device))[:, None]
            x = self._attention(layer, x, rotation, masks[layer.window], rows).add_(x)
            gate, up = layer.gate_up(layer.post_norm(x)).chunk(2, dim=-1)
            x = layer.down(F.silu(gate).mul_(up)).add_(x)
            if i in self.feature_layers:
                features.append(x)
        return torch.cat(features, dim=-1).view(rows, length, -1), model.norm(x).view(rows, length, -1)

    @torch.no_grad()
    def logits(self, normed: Tensor) -> Tensor:
        """[N, H] -> float32 [N, V]."""
        return self.model.head(normed).float()

    def _attention(self, layer: Layer, x: Tensor, rotation: Tensor, mask: Tensor, rows: int) -> Tensor:
        c = self.model.config
        qkv = layer.qkv(layer.input_norm(x)).view(x.shape[0], c.num_heads + 2 * c.num_kv_heads, c.head_dim)
        qk = qkv[:, : c.num_heads + c.num_kv_heads]
        if layer.q_norm is not None and layer.k_norm is not None:
            qk[:, : c.num_heads] = layer.q_norm(qk[:, : c.num_heads])
            qk[:, c.num_heads :] = layer.k_norm(qk[:, c.num_heads :])
        if layer.rotates:
            rotate_(qk, rotation)
        by_row = qkv.view(rows, -1, *qkv.shape[1:]).transpose(1, 2)  # [B, heads + 2 kv_heads, L, D]
        query, key, value = by_row.split((c.num_heads, c.num_kv_heads, c.num_kv_heads), dim=1)
        groups = c.num_heads // c.num_kv_heads
        key, value = (t.repeat_interleave(groups, dim=1) for t in (key, value))
        mixed = F.scaled_dot_product_attention(query, key, value, attn_mask=mask, scale=c.head_dim**-0.5)
        return layer.out(mixed.transpose(1, 2).reshape(x.shape[0], -1))


def _within(length: int, window: int, device: torch.device) -> Tensor:
    """[L, L] bool: the last `window` tokens."""
    at = torch.arange(length, device=device)
    return at[:, None] - at < window
