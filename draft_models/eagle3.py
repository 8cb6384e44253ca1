"""EAGLE-3 as drafter: a chain of k drafts from the target's own features (arXiv 2503.01840; network: eagle3_network).

    draft          window of the last tokens, target features        -> draft 1
                   draft j and the layer's own output, k - 1 times   -> draft j + 1
    after_verify   features of the verified tokens                   -> ring of the slot
    prefill_chunk  keys and values of the chunk's tokens             -> pool

While drafting is paused none of them runs, and nothing is kept up to date. Watermarks (`FeatureRing`) tell what is
missing when tokens come again: chains attend to nothing before the last gap, and draft the worse for it until there is
text behind it.

Keys and values lie in one pool under the target's block tables. Those a chain writes for its drafts come from the
layer's own output; the next chain's window writes them once more from the target's features. The window is as wide as
the longest chain, whatever k is: all of its tokens but the last need no more than one projection.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from draft_models.eagle3_chain import ChainShape, DeviceOnly, Sampler, as_drafts, chunk_positions, rows_from
from draft_models.eagle3_network import Eagle3Network
from draft_models.eagle3_ring import FeatureRing
from server.kernels.paged import PagedRows
from server.models.base import KVLayer
from server.models.paging import make_pools
from server.spec.device import CachedDrafts, DeviceStep
from server.spec.types import Drafts, Verdict


class Eagle3Drafter(DeviceOnly):
    """Implements draft_models.protocol.DeviceDrafter."""

    name = "eagle3"
    has_distribution = True

    def __init__(self, network: Eagle3Network, shape: ChainShape, sampler: Sampler) -> None:
        self.network, self.shape, self.sampler = network, shape, sampler
        c = network.config
        self.feature_layers = c.feature_layers
        self.pools = make_pools(
            [KVLayer(c.num_kv_heads, c.head_dim)], shape.num_blocks * shape.block_size, network.dtype, network.device
        )
        self.ring = FeatureRing(
            shape.num_slots,
            shape.num_blocks,
            shape.block_size,
            shape.max_draft_tokens + 1,
            c.hidden_size,
            network.embedding,
        )

    def admit_slots(self, slots: Tensor, num_tokens: Tensor, cached: CachedDrafts | None = None) -> None:
        """Blocks of a prefix hit carry keys, values and features; the rest of the prompt comes by `prefill_chunk`."""
        self.ring.admit(slots, cached)

    def draft(self, step: DeviceStep, k: int) -> Drafts:
        """See DeviceDrafter. ValueError: k is not 1 to the shape's `max_draft_tokens`."""
        if not 1 <= k <= self.shape.max_draft_tokens:
            raise ValueError(f"k: {k!r} is not valid; use 1 to {self.shape.max_draft_tokens}")
        net, pool = self.network, self.pools[0]
        window = net.ops.window(self.ring, step, k)
        queries, residual = net.remember(window.token_ids, window.features, window.positions, window.places, pool)
        queries, residual = net.ops.select(queries, residual, window.last)
        tokens: list[Tensor] = []
        probs: list[Tensor] = []
        for j in range(k):
            if j > 0:  # draft j lies at the position before the one that is drafted now
                queries, residual = net.remember(tokens[-1], residual, window.ends[j], window.end_places[j], pool)
            rows = rows_from(step, window.ends[j], 1, k - 1)
            residual, logits = net.attend(queries, residual, pool, rows, window.first)
            token, q = self.sampler(logits, step, window.ends[j + 1], net.target_ids)
            tokens.append(token)
            if q is not None:
                probs.append(q)
        return as_drafts(tokens, probs, step)

    def after_verify(self, step: DeviceStep, drafts: Drafts, verdict: Verdict, features: Tensor | None) -> None:
        """Keeps the features [R, 1 + k, F] of the verified tokens."""
        assert features is not None
        fused = self.network.fuse(features.flatten(0, 1)).view(*features.shape[:2], -1)
        self.network.ops.store(self.ring, step, verdict.num_emitted, fused)

    def prefill_chunk(self, step: DeviceStep, token_ids: Tensor, rows: PagedRows, features: Tensor | None) -> None:
        """Writes keys and values of the chunk; position p takes the features of p - 1, across chunks and blocks."""
        assert features is not None and rows.offsets is not None
        fused = self.network.fuse(features)
        shifted = fused.roll(1, dims=0)
        shifted[rows.offsets[:-1].to(torch.int64)] = self.ring.before_chunk(rows)
        positions, places, _ = chunk_positions(rows, token_ids.shape[0])
        self.network.remember(token_ids, shifted, positions, places, self.pools[0])
        self.ring.store_chunk(rows, fused)

    def resume(self, slots: Sequence[int], known: Sequence[Sequence[int]], seen: Sequence[int]) -> None:
        """Nothing: the device finds out by itself, and what was missed can not be computed without features."""
