"""What an EAGLE-3 head computes beside its linears: in torch, and with the Triton kernels of `server/kernels`."""

from __future__ import annotations

from typing import TYPE_CHECKING, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor

from draft_models.eagle3_ring import FeatureRing
from server.kernels.paged import PagedRows
from server.spec.device import DeviceStep

if TYPE_CHECKING:  # a kernel module: imported where one runs
    from server.kernels.eagle3_carry import Window


class Eagle3Ops(Protocol):
    """N tokens, H hidden, D head_dim. Everything stays on the device."""

    def window(self, ring: FeatureRing, step: DeviceStep, k: int) -> Window:
        """What the first pass of a chain of k drafts runs; the ring's marks count it as written."""

    def store(self, ring: FeatureRing, step: DeviceStep, num_emitted: Tensor, fused: Tensor) -> None:
        """Keeps `fused` [R, 1 + k, H] of the tokens that were just verified; `step.state` holds the verdict."""

    def embed_norm(self, ids: Tensor, table: Tensor, norm: Tensor, x: Tensor, x_norm: Tensor, eps: float) -> Tensor:
        """[N, 2 H]: the norm of rows `ids` [N] of `table` [V, H], then that of x [N, H]."""

    def select(self, queries: Tensor, x: Tensor, at: Tensor) -> tuple[Tensor, Tensor]:
        """Rows `at` [R] of queries [N, heads, D] and of x [N, H], contiguous."""

    def add_rms_norm_(self, x: Tensor, delta: Tensor, weight: Tensor, eps: float) -> Tensor:
        """Adds `delta` to x [N, H] in place -> the norm of the sum."""

    def silu_mul(self, gate_up: Tensor) -> Tensor:
        """[N, 2 I] -> silu(first half) * second half."""

    def rope_write(
        self, qkv: Tensor, pool: Tensor, positions: Tensor, places: Tensor, rotations: Tensor, heads: int
    ) -> None:
        """Turns queries (in place) and keys of qkv [N, (heads + 2 kv_heads) D]; writes keys and values to `places`."""

    def attention(self, q: Tensor, pool: Tensor, rows: PagedRows, first: Tensor) -> Tensor:
        """Queries q [R, heads, D], one a row -> [R, heads * D]; row r sees positions `first[r]` … `rows.starts[r]`."""


def window_arguments(
    ring: FeatureRing, step: DeviceStep
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, int, int]:
    """What `read_window` takes before k."""
    rows = (step.slots, step.limits, step.state.history, step.state.num_tokens, step.block_tables)
    return *rows, ring.ring, ring.marks, ring.block_size, ring.width


def store_arguments(
    ring: FeatureRing, step: DeviceStep, num_emitted: Tensor, fused: Tensor
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, int]:
    """What `store_features` takes."""
    rows = (step.slots, step.limits, step.state.num_tokens, num_emitted, step.block_tables)
    return *rows, fused, ring.ring, ring.by_block, ring.marks, ring.block_size


class TorchOps:
    """Any device, any dtype: the reference."""

    def window(self, ring: FeatureRing, step: DeviceStep, k: int) -> Window:
        """See Eagle3Ops."""
        from server.kernels.eagle3_carry import read_window_reference

        return read_window_reference(*window_arguments(ring, step), k)

    def store(self, ring: FeatureRing, step: DeviceStep, num_emitted: Tensor, fused: Tensor) -> None:
        """See Eagle3Ops."""
        from server.kernels.eagle3_carry import store_features_reference

        store_features_reference(*store_arguments(ring, step, num_emitted, fused))

    def embed_norm(self, ids: Tensor, table: Tensor, norm: Tensor, x: Tensor, x_norm: Tensor, eps: float) -> Tensor:
        """See Eagle3Ops."""
        embedded = F.rms_norm(F.embedding(ids, table), norm.shape, norm, eps)
        return torch.cat([embedded, F.rms_norm(x, x_norm.shape, x_norm, eps)], dim=-1)

    def select(self, queries: Tensor, x: Tensor, at: Tensor) -> tuple[Tensor, Tensor]:
        """See Eagle3Ops."""
        return queries[at], x[at]

    def add_rms_norm_(self, x: Tensor, delta: Tensor, weight: Tensor, eps: float) -> Tensor:
        """See Eagle3Ops."""
        return F.rms_norm(x.add_(delta), weight.shape, weight, eps)

    def silu_mul(self, gate_up: Tensor) -> Tensor:
        """See Eagle3Ops."""
        gate, up = gate_up.chunk(2, dim=-1)
        return F.silu(gate) * up

    def rope_write(
        self, qkv: Tensor, pool: Tensor, positions: Tensor, places: Tensor, rotations: Tensor, heads: int
    ) -> None:
        """See Eagle3Ops."""
        kv_heads, dim = pool.shape[1] // 2, pool.shape[2]
        by_head = qkv.view(qkv.shape[0], heads + 2 * kv_heads, dim)
        turned = by_head[:, : heads + kv_heads]
        pairs = turned.unflatten(-1, (-1, 2)).float()
        cos, sin = rotations[positions.clamp(0, rotations.shape[0] - 1)].unsqueeze(1).unbind(-1)
        even, odd = pairs.unbind(-1)
        turned.copy_(torch.stack([even * cos - odd * sin, even * sin + odd * cos], dim=-1).flatten(-2))
        pool.index_copy_(0, places, by_head[:, heads:].to(pool.dtype))

    def attention(self, q: Tensor, pool: Tensor, rows: PagedRows, first: Tensor) -> Tensor:
        """See Eagle3Ops."""
        num_rows, heads, dim = q.shape
        kv_heads = pool.shape[1] // 2
        at = torch.arange(min(rows.max_context, rows.block_tables.shape[1] * rows.block_size), device=q.device)
        tables = rows.block_tables[rows.slots]
        places = tables[:, at // rows.block_size] * rows.block_size + at % rows.block_size
        key, value = pool[places].to(q.dtype).transpose(1, 2).split(kv_heads, dim=1)  # [R, kv_heads, L, D]
        seen = (at >= first[:, None]) & (at <= rows.starts[:, None])
        query = q.view(num_rows, kv_heads, heads // kv_heads, dim)
        mixed = F.scaled_dot_product_attention(query, key, value, attn_mask=seen[:, None, None, :], scale=dim**-0.5)
        return mixed.reshape(num_rows, heads * dim)
