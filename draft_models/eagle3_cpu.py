"""EAGLE-3 as drafter on the CPU (arXiv 2503.01840): what eagle3.py does inside a GPU's graphs, row by row.

    prefill   keys and values of the chunk's tokens, from the target's features
    propose   those of the tokens that the last steps emitted, then a chain of k drafts
    commit    the features of what was emitted wait for the next chain

Keys and values lie in a pool under the target's block tables. A chain writes those of its drafts behind the known
tokens, where the next one overwrites them from the target's features.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from draft_models.eagle3_backlog import Backlog
from draft_models.eagle3_cpu_chain import Chain, CompiledChain, PartsChain
from draft_models.eagle3_cpu_network import Context, Eagle3CpuNetwork
from draft_models.eagle3_sampling import draw
from server.models.attention import AttentionBatch
from server.models.base import KVLayer
from server.models.paging import Span, make_pools, ragged_batch, side_by_side
from server.quant.cpu.draft_layer import Keys
from server.sampling.state import SamplingBatch
from server.spec.types import Carry, Drafts, Verdict


class Eagle3CpuDrafter:
    """Implements draft_models.protocol.Drafter and KeepsFeatures."""

    name = "eagle3"
    has_distribution = True

    def __init__(
        self, network: Eagle3CpuNetwork, max_num_seqs: int, num_blocks: int, block_size: int, rule: str
    ) -> None:
        c = network.config
        self.network, self.block_size, self.rule = network, block_size, rule
        self.feature_layers = c.feature_layers
        layer = KVLayer(c.num_kv_heads, c.head_dim)
        self.pools = make_pools([layer], num_blocks * block_size, network.dtype, network.device)
        self.backlog = Backlog(max_num_seqs, num_blocks, block_size, c.feature_width, network.embedding)
        self._blocks: list[list[int]] = [[] for _ in range(max_num_seqs)]
        self._paused = False

    # -- host events ---------------------------------------------------------------------------------------

    def admit(self, slot: int, token_ids: Sequence[int], prompt_len: int, prediction: Sequence[int] = ()) -> None:
        """Nothing is computed yet; what a prefix hit brings shows with the first chunk. A `prediction` is ignored."""
        self.backlog.admit(slot, token_ids)

    def reuse(self, slot: int, first: int, end: int) -> None:
        """The backlog knows by itself which blocks of a prefix hit hold keys and values for these very tokens."""

    def observe(self, slot: int, token_ids: Sequence[int]) -> None:
        self.backlog.tails[slot].tokens.extend(token_ids)

    def release(self, slot: int, complete: bool = False) -> None:
        """What the prefix cache keeps of the slot is completed, unless drafting is paused."""
        if not self._paused:
            self._complete_blocks(slot)
        self.backlog.admit(slot, ())

    def pause(self) -> None:
        """`keep` takes the place of `prefill` and `commit` until `propose` closes the gap."""
        self._paused = True

    # -- in the step ---------------------------------------------------------------------------------------

    def keep(self, carry: Carry, counts: Sequence[int], features: Tensor) -> None:
        """See KeepsFeatures."""
        self._paused = True
        at = 0
        for r, count in enumerate(counts):
            self._append(carry, r, features[at : at + count])
            at += count

    def prefill(
        self, carry: Carry, token_ids: Tensor, positions: Tensor, rows: Tensor, features: Tensor | None
    ) -> None:
        """Keys and values of the chunks; position p takes the features of p - 1, across chunks and blocks."""
        assert features is not None
        self._paused = False
        spans: list[Span] = []
        waiting: list[Tensor] = []
        ids: list[int] = []
        after: list[tuple[int, int, list[int], Tensor]] = []
        at = 0
        for r, (start, length) in enumerate(carry.chunks):
            slot, blocks, own = carry.slots[r], carry.blocks[r], features[at : at + length]
            tail = self.backlog.align(slot, start, blocks)
            self.backlog.keep_ends(start, own, blocks)
            if start + length > tail.done:
                spans.append(self._span(tail.done, start + length, blocks))
                waiting += [self.backlog.waiting(slot), own[:-1]]
                ids += tail.tokens[tail.done : start + length]
            after.append((slot, start + length, blocks, own[-1]))
            at += length
        if spans:
            self._remember(spans, ids, waiting)
        for slot, end, blocks, last in after:
            self.backlog.advance(slot, end, blocks, last)

    def propose(self, carry: Carry, k: int, sampling: SamplingBatch) -> Drafts:
        """A chain of `k` greedy, coupled or independent draws a row; rows with a lower limit get fewer."""
        self._paused = False
        known, tails = carry.tokens_host, [self.backlog.tails[slot] for slot in carry.slots]
        limits = [min(limit, k) if tail.count else 0 for limit, tail in zip(carry.limits, tails, strict=True)]
        width = max(limits)
        num_rows = len(limits)
        tokens = torch.zeros(num_rows, width, dtype=torch.int64)
        probs: list[Tensor] = []
        if width:
            rows = sorted((r for r in range(num_rows) if limits[r]), key=lambda r: -limits[r])
            self._chain(carry, rows, limits, sampling, tokens, probs)
        for r in range(num_rows):
            if limits[r]:
                self.backlog.advance(carry.slots[r], known[r], carry.blocks[r])
        return Drafts(
            tokens,
            torch.tensor(limits, dtype=torch.int64),
            limits,
            torch.stack(probs, dim=1) if probs else None,
            [self.name] * num_rows,
        )

    def commit(self, carry: Carry, drafts: Drafts, verdict: Verdict, features: Tensor | None) -> None:
        """The features of what was emitted wait."""
        assert features is not None
        for r, count in enumerate(verdict.num_emitted.tolist()):
            self._append(carry, r, features[r, :count])

    def _append(self, carry: Carry, row: int, features: Tensor) -> None:
        slot = carry.slots[row]
        self._blocks[slot] = list(carry.blocks[row])  # the scheduler's own list: empty when the slot is released
        self.backlog.append(slot, carry.chunks[row][0], features, carry.blocks[row])

    # -- passes through the network ------------------------------------------------------------------------

    def _chain(
        self,
        carry: Carry,
        rows: list[int],
        limits: list[int],
        sampling: SamplingBatch,
        tokens: Tensor,
        probs: list[Tensor],
    ) -> None:
        """Drafts for `rows`, those with the highest limits first, into `tokens` [R, width] and `probs`."""
        net, chain = self.network, self._catch_up(carry, rows, limits)
        order, whole = torch.tensor(rows), rows == list(range(len(limits)))
        known = carry.state.num_tokens[carry.slot_ids]
        positions = known if whole else known[order]
        for j in range(tokens.shape[1]):
            count = sum(limits[r] > j for r in rows)
            if j > 0:
                chain.enter(tokens[order[:count], j - 1], positions[:count] + (j - 1))
            logits = chain.leave(count)
            if not whole or count < len(limits):  # others draw from zeros; nobody looks
                logits = logits.new_zeros(len(limits), logits.shape[1]).index_copy_(0, order[:count], logits)
            tokens[:, j], q = draw(logits, sampling, known + j, self.rule, net.target_ids, net.config.vocab_size)
            if q is not None:
                probs.append(q)

    def _catch_up(self, carry: Carry, rows: list[int], limits: list[int]) -> Chain:
        """Keys and values of all known tokens; the chain goes on behind the last one of each row."""
        spans: list[Span] = []
        waiting: list[Tensor] = []
        ids: list[int] = []
        ends: list[int] = []
        for r in rows:
            slot, end, blocks = carry.slots[r], carry.tokens_host[r], carry.blocks[r]
            tail = self.backlog.tails[slot]
            spans.append(self._span(tail.done, end, blocks, limits[r] - 1))
            waiting.append(self.backlog.waiting(slot))
            ids += tail.tokens[tail.done : end]
            ends.append(len(ids) - 1)
        qkv, x, batch = self._remember(spans, ids, waiting)
        net = self.network
        if len(ids) > len(rows) or len(qkv) != max(len(rows), net.min_rows):
            last = torch.tensor(ends + [0] * (net.min_rows - len(ends)))
            qkv, x = qkv[last], x[last]
        if net.layer is not None:
            return CompiledChain(net.layer, self.pools[0], self._keys(carry, rows, limits), qkv, x)
        contexts = [self._context(carry, r, limits[r] - 1, batch, i) for i, r in enumerate(rows)]
        return PartsChain(net, contexts, qkv, x)

    def _keys(self, carry: Carry, rows: list[int], limits: list[int]) -> Keys:
        """Of each row from the first right one to the last known token's, and where its drafts' go."""
        places, counts, size = [], [], self.block_size
        for r in rows:
            first, known = self.backlog.tails[carry.slots[r]].first, carry.tokens_host[r]
            end = known + limits[r] - 1
            table = np.asarray(carry.blocks[r][first // size : -(-end // size)], dtype=np.int64)
            every = (table[:, None] * size + np.arange(size)).reshape(-1)
            places.append(every[first % size : end - first // size * size])
            counts.append(known - first)
        return Keys(places, counts)

    def _context(self, carry: Carry, row: int, extra: int, batch: AttentionBatch, index: int) -> Context:
        """Keys and values from the first right one to the last known token's, and room for `extra` drafts'."""
        assert batch.rows is not None
        first, place, pool = self.backlog.tails[carry.slots[row]].first, batch.rows[index].index, self.pools[0]
        length = carry.tokens_host[row] - first
        if isinstance(place, slice):
            return Context(pool.narrow(0, place.start + first, length + extra), length)
        kv = pool.new_empty(length + extra, *pool.shape[1:])
        torch.index_select(pool, 0, place[first:], out=kv[:length])
        return Context(kv, length)

    def _span(self, start: int, end: int, blocks: list[int], extra: int = 0) -> Span:
        self.backlog.disown(start, end + extra, blocks)
        return Span(start, end - start, blocks, side_by_side(blocks))

    def _remember(
        self, spans: list[Span], ids: list[int], waiting: list[Tensor]
    ) -> tuple[Tensor, Tensor, AttentionBatch]:
        """Writes keys and values of the spans' tokens -> their projections and stream, padded to `min_rows`."""
        net = self.network
        short = max(0, net.min_rows - len(ids))
        batch = ragged_batch(spans, self.block_size, short)
        if short:
            waiting = [*waiting, waiting[0].new_zeros(short, waiting[0].shape[1])]
        features = torch.cat(waiting) if len(waiting) > 1 else waiting[0]
        x, tokens = net.fuse(features), torch.tensor(ids + [0] * short)
        if net.layer is not None:
            slots = batch.slot_mapping.numpy()
            return net.layer.enter(tokens, x, batch.positions, slots, self.pools[0]), x, batch
        qkv, x = net.project(tokens, x, batch.positions)
        self.pools[0].index_copy_(0, batch.slot_mapping, qkv[:, net.config.num_heads :])
        return qkv, x, batch

    def _complete_blocks(self, slot: int) -> None:
        """Computes what is missing of the slot's last full block, whose features are all there."""
        tail, blocks, size = self.backlog.tails[slot], self._blocks[slot], self.block_size
        end = min(tail.done + tail.count - 1, len(tail.tokens)) // size * size
        if 0 <= tail.done < end and bool(self.backlog.waiting(slot).isfinite().all()):
            waiting = self.backlog.waiting(slot)
            last = waiting[end - tail.done].clone()
            span = self._span(tail.done, end, blocks)
            self._remember([span], tail.tokens[tail.done : end], [waiting[: end - tail.done]])
            self.backlog.advance(slot, end, blocks, last)
        elif tail.done >= 0:
            self.backlog.settle(tail, blocks)
