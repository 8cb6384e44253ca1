"""Attention of a whole network by kernels: which one for which rows, how contexts are split, where partials live."""

from __future__ import annotations

import torch
from torch import Tensor

from server.kernels.attention import MAX_WIDTH, Splits, Tile, Workspace, decode_attention, plan_splits
from server.kernels.attention_plan import decode_tile, partials_needed
from server.kernels.attention_prefill import prefill_attention
from server.kernels.paged import PagedRows
from server.kernels.runtime import num_sms


class KernelAttention:
    """Paged attention for layers of one shape: decode and verify rows in one kernel, prompt chunks in another.

    Partial results live in one workspace that grows to what the largest step needs. Outgrown ones are kept: a captured
    graph may still write to them. A workspace serves one stream.
    """

    def __init__(self, num_heads: int, num_kv_heads: int, head_dim: int, *, deterministic: bool, pdl: bool) -> None:
        self.num_heads, self.num_kv_heads, self.head_dim = num_heads, num_kv_heads, head_dim
        self.deterministic, self.pdl = deterministic, pdl
        self._workspaces: list[Workspace] = []

    def __call__(
        self,
        q: Tensor,
        pool: Tensor,
        rows: PagedRows,
        out: Tensor,
        *,
        window: int | None = None,
        softcap: float | None = None,
        sinks: Tensor | None = None,
        scale: float | None = None,
    ) -> Tensor:
        """Causal attention of q [N, num_heads, head_dim] over `pool`, into `out` [N, num_heads * head_dim].

        `scale` None: 1 / sqrt(head_dim). Tokens behind the last row's keep what `out` holds. The rows' own tensors, and
        the keys and values at positions before `rows.starts`, must have been complete before the kernel before this one
        began.
        """
        scale = self.head_dim**-0.5 if scale is None else scale
        if not 1 <= rows.width <= MAX_WIDTH:
            return prefill_attention(
                q, pool, rows,
                scale=scale, window=window, softcap=softcap, sinks=sinks, out=out, deterministic=self.deterministic,
            )  # fmt: skip
        used = rows.num_rows * rows.width
        q, out = q[:used], out[:used]
        group = self.num_heads // self.num_kv_heads
        programs = rows.num_rows * self.num_kv_heads
        tile = decode_tile(rows.width, group, self.head_dim, q.dtype, pool.dtype, self.deterministic, programs)
        splits = self.splits(rows, q.device, tile)
        workspace = self._workspace(rows, splits, tile, q.device) if splits.num_splits > 1 else None
        return decode_attention(
            q, pool, rows,
            scale=scale, splits=splits, workspace=workspace, window=window, softcap=softcap, sinks=sinks, out=out,
            pdl=self.pdl, settled=self.pdl, tile=tile,
        )  # fmt: skip

    def splits(self, rows: PagedRows, device: torch.device, tile: Tile) -> Splits:
        """How the contexts of `rows` are divided among programs."""
        return plan_splits(
            rows.num_rows,
            rows.width,
            self.num_heads,
            self.num_kv_heads,
            rows.max_context,
            num_sms(device),
            self.deterministic,
            tile.block_n,
        )

    def _workspace(self, rows: PagedRows, splits: Splits, tile: Tile, device: torch.device) -> Workspace:
        partials = partials_needed(rows.num_rows, rows.width, self.num_heads, self.num_kv_heads, splits, tile.block_m)
        counters = rows.num_rows * self.num_heads * rows.width
        last = self._workspaces[-1] if self._workspaces else None
        if last is not None and last.maxima.numel() >= partials and last.counters.numel() >= counters:
            return last
        if last is not None:
            partials, counters = max(partials, last.maxima.numel()), max(counters, last.counters.numel())
        self._workspaces.append(Workspace.allocate(device, partials, self.head_dim, counters))
        return self._workspaces[-1]
