"""What an EAGLE-3 head computes beside its linears, with kernels. Imported only where they run."""

from __future__ import annotations

import torch
from torch import Tensor

from draft_models.eagle3_ops import store_arguments, window_arguments
from draft_models.eagle3_ring import FeatureRing
from server.kernels.activation import silu_mul
from server.kernels.attention import decode_attention
from server.kernels.attention_plan import Splits, Tile, Workspace, decode_tile, partials_needed, plan_splits
from server.kernels.eagle3_carry import Window, read_window, store_features
from server.kernels.embedding import embed_norm
from server.kernels.gather import select_rows
from server.kernels.norm import add_rms_norm_
from server.kernels.paged import PagedRows
from server.kernels.rope import rope_write
from server.kernels.runtime import num_sms, supports_pdl
from server.spec.device import DeviceStep


class KernelOps:
    """Implements Eagle3Ops."""

    def __init__(self) -> None:
        self._plans: dict[tuple[int, ...], tuple[Tile, Splits, Workspace | None]] = {}

    def window(self, ring: FeatureRing, step: DeviceStep, k: int) -> Window:
        """See Eagle3Ops. `step.limits` and `step.slots` are contiguous."""
        return read_window(*window_arguments(ring, step), k)

    def store(self, ring: FeatureRing, step: DeviceStep, num_emitted: Tensor, fused: Tensor) -> None:
        """See Eagle3Ops."""
        store_features(*store_arguments(ring, step, num_emitted, fused))

    def embed_norm(self, ids: Tensor, table: Tensor, norm: Tensor, x: Tensor, x_norm: Tensor, eps: float) -> Tensor:
        """See Eagle3Ops."""
        return embed_norm(ids, table, norm, x, x_norm, eps)

    def select(self, queries: Tensor, x: Tensor, at: Tensor) -> tuple[Tensor, Tensor]:
        """See Eagle3Ops."""
        return select_rows(queries, x, at)

    def add_rms_norm_(self, x: Tensor, delta: Tensor, weight: Tensor, eps: float) -> Tensor:
        """See Eagle3Ops."""
        return add_rms_norm_(x, delta, weight, eps)

    def silu_mul(self, gate_up: Tensor) -> Tensor:
        """See Eagle3Ops."""
        return silu_mul(gate_up)

    def rope_write(
        self, qkv: Tensor, pool: Tensor, positions: Tensor, places: Tensor, rotations: Tensor, heads: int
    ) -> None:
        """See Eagle3Ops."""
        rope_write(qkv, pool, positions, places, rotations, heads, pool.shape[1] // 2, pool.shape[2])

    def attention(self, q: Tensor, pool: Tensor, rows: PagedRows, first: Tensor) -> Tensor:
        """See Eagle3Ops."""
        tile, splits, workspace = self._plan(q, pool, rows)
        return decode_attention(
            q, pool, rows,
            scale=q.shape[2] ** -0.5, tile=tile, splits=splits, workspace=workspace, pdl=supports_pdl(q.device),
            first=first,
        )  # fmt: skip

    def _plan(self, q: Tensor, pool: Tensor, rows: PagedRows) -> tuple[Tile, Splits, Workspace | None]:
        """RuntimeError: first asked for while a graph is captured, which would own the workspace."""
        num_rows, heads, dim = q.shape
        key = (num_rows, heads, pool.shape[1], dim, rows.max_context)
        found = self._plans.get(key)
        if found is None:
            if q.is_cuda and torch.cuda.is_current_stream_capturing():
                raise RuntimeError("run a chain before capturing one: a workspace cannot be made inside a graph")
            kv_heads = pool.shape[1] // 2
            tile = decode_tile(1, heads // kv_heads, dim, q.dtype, pool.dtype, False, len(q) * kv_heads)
            splits = plan_splits(
                num_rows, 1, heads, kv_heads, rows.max_context, num_sms(q.device), block_n=tile.block_n
            )
            workspace = None
            if splits.partials > 1:
                needed = partials_needed(num_rows, 1, heads, kv_heads, splits, tile.block_m)
                workspace = Workspace.allocate(q.device, needed, dim, num_rows * heads)
            found = self._plans[key] = (tile, splits, workspace)
        return found
