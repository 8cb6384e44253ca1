"""Attention over the paged KV pool, in torch operations.

One pool tensor a layer: [num_blocks * block_size, 2 * kv_heads, head_dim], keys in the first half of the heads and
values in the second, so that one copy writes both. Block 0 is nobody's: padding tokens write there.

Two implementations of the same function: `ragged` (CPU) runs each row over exactly its own tokens and uses a view where
the row's blocks lie side by side; `padded` (any device, nothing syncs) gathers every row to the longest. On a GPU
kernels take their place (`server.kernels.attention`).

On a CPU in float32 `ragged` gives a token the same bits however many tokens its row computes at once, so that
decoding, verifying and prefilling in any chunks agree. Three things make it so (found by measuring MKL;
tests/models/test_attention.py watches them): the mask is always explicit; products have a multiple of 4 rows, with
which MKL treats all rows alike; and keys are padded, masked, to lengths at which MKL and the fused operator cut the
reduction in the same places. The padding reads places that are not the row's: a pool must be finite everywhere, so
allocate it zeroed.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import Protocol

import torch
import torch.nn.functional as F
from torch import Tensor

FOLD_LIMIT = 16
"""Up to this many query tokens a row, grouped heads are folded into the query axis: one key head, one matmul."""


class PagedAttention(Protocol):
    """Attention of q [N, heads, D] over a pool, for the rows of one step -> [N, heads * D]."""

    def __call__(
        self,
        q: Tensor,
        pool: Tensor,
        *,
        scale: float,
        window: int | None,
        softcap: float | None,
        sinks: Tensor | None,
    ) -> Tensor:
        """See `paged_attention`."""


@dataclass(slots=True)
class Row:
    """One sequence's share of a ragged batch: query tokens `q_start .. q_start + q_len`, `kv_len` visible tokens.

    Rows lie one after another; tokens beyond the last are padding.

    `index` addresses the tokens' places in the pool: a slice where the blocks lie side by side, else a [kv_len] tensor.
    """

    q_start: int
    q_len: int
    kv_len: int
    index: slice | Tensor


@dataclass(slots=True)
class AttentionBatch:
    """How the tokens of one step see the KV pool.

    `slot_mapping` [N]: place in the pool that each token's key and value are written to. Exactly one of `rows`
    (ragged), `gather` (padded) and `paged` (a GPU's kernels) is used. Padded: every row has `width` query tokens,
    `gather` [R, L] are places in the pool; what a token sees follows from `positions` [N].
    """

    slot_mapping: Tensor
    positions: Tensor
    rows: list[Row] | None = None
    gather: Tensor | None = None
    width: int = 0
    paged: PagedAttention | None = None
    _masks: dict[tuple[int, int, int, int | None], Tensor] = field(default_factory=dict)
    _indices: dict[int, Tensor] = field(default_factory=dict)
    _queries: dict[torch.Size, tuple[Tensor, Tensor]] = field(default_factory=dict)

    def to(self, device: torch.device) -> AttentionBatch:
        """The same batch on `device`; itself if it is there."""
        if self.positions.device == device:
            return self

        def move(tensor: Tensor) -> Tensor:
            return tensor.to(device, non_blocking=True)

        rows = self.rows
        if rows is not None:
            rows = [replace(r, index=r.index if isinstance(r.index, slice) else move(r.index)) for r in rows]
        gather = None if self.gather is None else move(self.gather)
        slots, positions = move(self.slot_mapping), move(self.positions)
        return replace(
            self, slot_mapping=slots, positions=positions, rows=rows, gather=gather, _masks={}, _indices={}, _queries={}
        )

    def mask(self, row: Row, window: int | None, dtype: torch.dtype, fold: int) -> Tensor:
        """Additive mask [padded_rows(fold * q_len), padded_keys(kv_len)] of a row; padding rows see everything."""
        key = (row.q_len, row.kv_len, fold, window)
        found = self._masks.get(key)
        if found is None:
            mask = _causal_mask(row.q_len, row.kv_len, window, dtype).repeat_interleave(fold, dim=0)
            mask = F.pad(mask, (0, 0, 0, padded_rows(len(mask)) - len(mask)))
            found = self._masks[key] = mask.to(self.positions.device, non_blocking=True)
        return found

    def keys_and_values(self, row: Row, pool: Tensor) -> tuple[Tensor, Tensor]:
        """Keys and values, [1, kv_heads, padded_keys(kv_len), head_dim] each; views where they lie side by side."""
        length = padded_keys(row.kv_len)
        if isinstance(row.index, slice) and row.index.start + length <= len(pool):
            kv = pool.narrow(0, row.index.start, length)
        else:
            kv = pool.index_select(0, self._places(row, length, pool.device))
        key, value = kv.transpose(0, 1).unsqueeze(0).chunk(2, dim=1)
        return key, value

    def _places(self, row: Row, length: int, device: torch.device) -> Tensor:
        found = self._indices.get(row.q_start)
        if found is None:
            at = row.index
            places = torch.arange(at.start, at.start + row.kv_len, device=device) if isinstance(at, slice) else at
            found = self._indices[row.q_start] = F.pad(places, (0, length - row.kv_len))
        return found

    def heads_first(self, q: Tensor, fold: int) -> Tensor:
        """[n, heads, D] -> [1, heads / fold, padded_rows(n * fold), D].

        Row i * fold + j is query i of a group's j-th head. The result is one buffer a shape, overwritten by the next
        call: layers come one after another.
        """
        n, heads, dim = q.shape
        found = self._queries.get(q.shape)
        if found is None or found[1].shape[2] != fold:
            whole = q.new_zeros(1, heads // fold, padded_rows(n * fold), dim)
            part = whole[0, :, : n * fold].unflatten(1, (n, fold)).transpose(0, 1)
            found = self._queries[q.shape] = (whole, part)
        found[1].copy_(q.view(n, -1, fold, dim))
        return found[0]


def padded_rows(n: int) -> int:
    """The next multiple of 4: with it, a row's product does not depend on how many rows there are."""
    return -(-n // 4) * 4


def padded_keys(n: int) -> int:
    """The next length at which masked keys at the end change no bit.

    The fused operator takes 512 keys at a time; of the rest, MKL reduces up to 192 in one go, more in parts of 192, but
    between 192 and 384 in two halves. Multiples of 16 keep its vectors whole.
    """
    whole, rest = divmod(n, 512)
    return whole * 512 + (384 if 192 < rest < 384 else -(-rest // 16) * 16)


def _causal_mask(q_len: int, kv_len: int, window: int | None, dtype: torch.dtype) -> Tensor:
    queries = torch.arange(kv_len - q_len, kv_len).unsqueeze(1)
    keys = torch.arange(padded_keys(kv_len)).unsqueeze(0)
    hidden = keys > queries
    if window is not None:
        hidden |= keys <= queries - window
    return torch.zeros(hidden.shape, dtype=dtype).masked_fill_(hidden, float("-inf"))


def write_kv(pool: Tensor, slot_mapping: Tensor, kv: Tensor) -> None:
    """Writes `kv` [N, 2 * kv_heads, head_dim] to the pool places `slot_mapping` [N]."""
    pool.index_copy_(0, slot_mapping, kv)


@dataclass(frozen=True, slots=True)
class Scoring:
    """How query-key products become weights: `scale`, a sliding `window`, and two rarities.

    `softcap`: scores become softcap * tanh(scores / softcap) (Gemma 2). `sinks` [heads]: one more score a head, which
    takes its share of the softmax and has no value (GPT-OSS).
    """

    scale: float
    window: int | None = None
    softcap: float | None = None
    sinks: Tensor | None = None

    @property
    def fused(self) -> bool:
        """Whether torch's fused operator computes it."""
        return self.softcap is None and self.sinks is None


def paged_attention(
    q: Tensor,
    pool: Tensor,
    batch: AttentionBatch,
    *,
    scale: float,
    window: int | None = None,
    softcap: float | None = None,
    sinks: Tensor | None = None,
) -> Tensor:
    """Causal attention of q [N, heads, head_dim] over the pool -> [N, heads * head_dim]; see Scoring.

    The step's own keys and values must have been written already.
    """
    if batch.paged is not None:
        return batch.paged(q, pool, scale=scale, window=window, softcap=softcap, sinks=sinks)
    scoring = Scoring(scale, window, softcap, sinks)
    if batch.rows is not None:
        return _ragged(q, pool, batch, scoring)
    return _padded(q, pool, batch, scoring)


def _ragged(q: Tensor, pool: Tensor, batch: AttentionBatch, how: Scoring) -> Tensor:
    assert batch.rows is not None
    num_tokens, heads, dim = q.shape
    kv_heads = pool.shape[1] // 2
    last = batch.rows[-1]
    padding = last.q_start + last.q_len != num_tokens
    out = (q.new_zeros if padding else q.new_empty)(num_tokens, heads, dim)
    for row in batch.rows:
        n = row.q_len
        key, value = batch.keys_and_values(row, pool)
        fold = heads // kv_heads if n <= FOLD_LIMIT or not how.fused else 1
        query = batch.heads_first(q.narrow(0, row.q_start, n), fold)
        if not how.fused:
            res = _explicit(query, key, value, batch.mask(row, how.window, q.dtype, fold), how)
        elif q.is_cuda and fold == 1 and n == row.kv_len and how.window is None:
            key, value = key[:, :, :n], value[:, :, :n]  # a GPU's fused kernels take no mask
            res = F.scaled_dot_product_attention(query, key, value, is_causal=True, scale=how.scale, enable_gqa=True)
        else:
            mask = batch.mask(row, how.window, q.dtype, fold)
            gqa = query.shape[1] != kv_heads
            res = F.scaled_dot_product_attention(query, key, value, attn_mask=mask, scale=how.scale, enable_gqa=gqa)
        grouped = res.transpose(1, 2).narrow(1, 0, n * fold).view(n, fold, -1, dim).transpose(1, 2)
        out.narrow(0, row.q_start, n).view(n, -1, fold, dim).copy_(grouped)
    return out.view(num_tokens, heads * dim)


def _explicit(query: Tensor, key: Tensor, value: Tensor, mask: Tensor, how: Scoring) -> Tensor:
    """Attention spelled out, for what the fused operator lacks.

    query [R, kv_heads, M, D]: row i * group + j is query i of a group's j-th head; mask broadcasts to [R, 1, M, L].
    """
    scores = (query @ key.transpose(-1, -2)).float() * how.scale
    if how.softcap is not None:
        scores = torch.tanh(scores / how.softcap) * how.softcap
    scores = scores + mask
    if how.sinks is not None:
        num_rows, kv_heads, folded, _ = query.shape
        sinks = how.sinks.float().view(kv_heads, -1)
        sinks = sinks.repeat(1, -(-folded // sinks.shape[1]))[:, :folded]
        scores = torch.cat((scores, sinks.expand(num_rows, -1, -1).unsqueeze(-1)), dim=-1)
    weights = scores.softmax(dim=-1)[..., : key.shape[2]]
    return weights.to(value.dtype) @ value


def _padded(q: Tensor, pool: Tensor, batch: AttentionBatch, how: Scoring) -> Tensor:
    assert batch.gather is not None
    num_rows, length = batch.gather.shape
    num_tokens, heads, dim = q.shape
    kv_heads = pool.shape[1] // 2
    group = heads // kv_heads
    width = batch.width
    kv = pool[batch.gather]  # [R, L, 2 * kv_heads, D]
    key, value = kv[:, :, :kv_heads].transpose(1, 2), kv[:, :, kv_heads:].transpose(1, 2)
    used = num_rows * width
    query = q[:used].reshape(num_rows, width, heads, dim)
    keys_at = torch.arange(length, device=q.device)
    at = batch.positions[:used].view(num_rows, 1, width, 1)
    visible = keys_at <= at
    if how.window is not None:
        visible = visible & (keys_at > at - how.window)
    if how.fused:
        query = query.transpose(1, 2)
        res = F.scaled_dot_product_attention(
            query, key, value, attn_mask=visible, scale=how.scale, enable_gqa=group > 1
        ).transpose(1, 2)
    else:
        mask = torch.zeros(visible.shape, device=q.device).masked_fill_(~visible, float("-inf"))
        folded = query.unflatten(2, (kv_heads, group)).transpose(1, 2).flatten(2, 3)
        res = _explicit(folded, key, value, mask.repeat_interleave(group, dim=2), how)
        res = res.unflatten(2, (width, group)).transpose(1, 2)
    out = q.new_zeros(num_tokens, heads, dim)
    out[:used] = res.reshape(used, heads, dim)
    return out.view(num_tokens, heads * dim)
