"""A drafting head's one decoder layer in two compiled calls of the team: until keys and values are written, and on.

A draft is a handful of small products: called one by one, waking threads and torch's own calls cost more than they do.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from server.quant.cpu.activations import GROUP, SCALE_BYTES, quantize_gated_rows, quantize_normed_rows, quantize_rows
from server.quant.cpu.attention import results_size, scratch_size, write_token
from server.quant.cpu.barrier import wait
from server.quant.cpu.linear import CpuLinear
from server.quant.cpu.product import PackedWeight, aligned, multiply
from server.quant.cpu.step import FEW, ROW_FIELDS, ROW_PLACES, ROW_POSITION, ROW_START, ROW_TOKENS, attention, share
from server.quant.cpu.team import team
from server.quant.cpu.vectors import jit


@jit
def run_entrance(
    thread, threads, table, token_ids, x, norms, eps, shape, qkv, out, rotations, positions, slots, pool, q, s, barrier
):  # fmt: skip
    """Out [N, width] = the layer's projections of [norm of the tokens' embeddings | norm of x]. Queries are rotated
    there, rotated keys and values written to the pool at `slots` [N].

    table: address of the embedding [V, H]; x: address of [N, H]; norms: addresses of both norms' weights; shape: of
    `DraftLayer`; qkv: kind, address, tiles and outputs of the weight.
    """
    n, groups, heads, kv_heads, dim = len(token_ids), shape[0] // 32, shape[1], shape[2], shape[3]
    stride = groups * 128
    first, end = share(n, thread, threads)
    for t in range(first, end):
        to_q, to_s = q + t * 2 * groups * 32, s + t * 2 * groups * 12
        quantize_normed_rows(table + token_ids[t] * stride, stride, norms[0], eps, groups, to_q, to_s, 0, groups)
        quantize_normed_rows(
            x + t * stride, stride, norms[1], eps, groups, to_q + groups * 32, to_s + groups * 12, 0, groups
        )
    wait(barrier, threads)
    first, end = share(qkv[2], thread, threads)
    multiply(qkv[0], qkv[1], q, s, 2 * groups, out, qkv[3] * 4, n, 0, first, end)
    wait(barrier, threads)
    first, end = share(n, thread, threads)
    for t in range(first, end):
        place = pool + slots[t] * 2 * kv_heads * dim * 4
        write_token(out + t * qkv[3] * 4, heads, kv_heads, dim, rotations + positions[t] * dim * 4, place, 1)
    wait(barrier, threads)


@jit
def run_exit(
    thread, threads, qkv, mixed, x, rows, places, pool, norms, eps, shape, weights, wide, logits, q, s, results, work,
    barrier,
):  # fmt: skip
    """X [N, H] += attention's result times `out`, then the feed-forward layer; logits [N, C] of the normed x.

    qkv, mixed: float32 [N * width] and [N * heads * D]. rows, places: of each token's keys, as `step` has them.
    weights: kind, address, tiles and outputs of `out`, `gate_up`, `down` and the output layer, a row each.
    """
    n, groups, inner_groups = len(rows), shape[0] // 32, shape[4] // 32
    wide_groups, stride, x_at = shape[1] * shape[3] // 32, shape[0] * 4, x.ctypes.data
    attention(qkv, mixed, rows, places, 0, n, 0, pool, shape, work, results, barrier, thread, threads)
    wait(barrier, threads)
    first, end = share(n * wide_groups, thread, threads)
    quantize_rows(mixed.ctypes.data, wide_groups * 128, wide_groups, q, s, first, end)
    wait(barrier, threads)
    w = weights[0]
    first, end = share(w[2], thread, threads)
    multiply(w[0], w[1], q, s, wide_groups, x_at, stride, n, 1, first, end)
    wait(barrier, threads)
    first, end = share(n * groups, thread, threads)
    quantize_normed_rows(x_at, stride, norms[0], eps, groups, q, s, first, end)
    wait(barrier, threads)
    w = weights[1]
    first, end = share(w[2], thread, threads)
    multiply(w[0], w[1], q, s, groups, wide, inner_groups * 256, n, 0, first, end)
    wait(barrier, threads)
    first, end = share(n * inner_groups, thread, threads)
    quantize_gated_rows(wide, inner_groups, q, s, first, end)
    wait(barrier, threads)
    w = weights[2]
    first, end = share(w[2], thread, threads)
    multiply(w[0], w[1], q, s, inner_groups, x_at, stride, n, 1, first, end)
    wait(barrier, threads)
    first, end = share(n * groups, thread, threads)
    quantize_normed_rows(x_at, stride, norms[1], eps, groups, q, s, first, end)
    wait(barrier, threads)
    w = weights[3]
    first, end = share(w[2], thread, threads)
    multiply(w[0], w[1], q, s, groups, logits, w[3] * 4, n, 0, first, end)
    wait(barrier, threads)


class Keys:
    """Which keys and values in the pool each row of a chain sees."""

    def __init__(self, places: Sequence[NDArray[np.int64]], count: Sequence[int]) -> None:
        """`places[i]`: of the row's tokens and of the drafts that it may have; `count[i]`: how many are there now."""
        self.places = np.concatenate(places)
        self.rows = np.empty((len(places), ROW_FIELDS), dtype=np.int64)
        self.rows[:, ROW_START], self.rows[:, ROW_TOKENS] = np.arange(len(places)), 1
        self.rows[:, ROW_POSITION] = np.asarray(count) - 1
        self.rows[:, ROW_PLACES] = np.cumsum([0, *(len(p) for p in places[:-1])])

    def next_places(self, count: int) -> NDArray[np.int64]:
        """Where the next token of the first `count` rows is written; they see it from now on."""
        rows = self.rows[:count]
        rows[:, ROW_POSITION] += 1
        found: NDArray[np.int64] = self.places[rows[:, ROW_PLACES] + rows[:, ROW_POSITION]]
        return found


class DraftLayer:
    """The layer. Results are those of its parts to the rounding of float32 sums, and a token's do not depend on what is
    computed beside it."""

    def __init__(
        self,
        table: Tensor,
        norms: Sequence[Tensor],
        eps: float,
        linears: Sequence[CpuLinear],
        heads: tuple[int, int, int],
        rotations: Tensor,
    ) -> None:
        """`norms`: of embeddings, of what is handed over, behind attention, before the output layer, float32 [H].
        `linears`: qkv [width, 2 H], out, gate_up, down, output layer; none but the last may be padded (`fits`).
        `heads`: of queries, of keys, and the dimension of one. `rotations` [P, D / 2] complex64.
        """
        self._table, self._norms, self._eps, self._linears = table, [n.contiguous() for n in norms], eps, list(linears)
        self._rotations = rotations
        self.hidden, self.inner = table.shape[1], linears[3].in_features
        qkv, *rest = ([*_kind_and_address(linear.packed), linear.packed.out_features] for linear in linears)
        self._entrance, self._exit = np.array(qkv, dtype=np.int64), np.array(rest, dtype=np.int64)
        self._shape = np.array([self.hidden, *heads, self.inner, 0], dtype=np.int64)
        addresses = [norm.data_ptr() for norm in self._norms]
        self._ahead, self._behind = np.array(addresses[:2], dtype=np.int64), np.array(addresses[2:], dtype=np.int64)
        self._team = team(torch.get_num_threads())
        _, kv_heads, dim = heads
        self._mixed = heads[0] * dim
        self._scratch_for = (kv_heads, dim, len(rotations), self._team.size)

    def enter(self, token_ids: Tensor, x: Tensor, positions: Tensor, slots: NDArray[np.int64], pool: Tensor) -> Tensor:
        """Queries of tokens [N], rotated, and what has become keys and values in `pool` at `slots` [N]: [N, width].

        `x` [N, H] is handed over, `positions` [N].
        """
        x, n = x.contiguous(), len(token_ids)
        out = torch.empty(n, self._linears[0].out_features)
        q, s = _scratch(n * 2 * self.hidden)
        ids, where = (np.ascontiguousarray(each.numpy()) for each in (token_ids, positions))
        fields = (
            self._table.data_ptr(), ids, x.data_ptr(), self._ahead, self._eps, self._shape, self._entrance,
            out.data_ptr(), self._rotations.data_ptr(), where, slots, pool.data_ptr(), int(q.ctypes.data),
            int(s.ctypes.data), self._team.barrier,
        )  # fmt: skip
        size = self._team.size
        self._team.run(run_entrance, [(i, size, *fields) for i in range(size)])
        return out

    def leave(self, qkv: Tensor, residual: Tensor, keys: Keys, pool: Tensor) -> tuple[Tensor, Tensor]:
        """Of `qkv` [N, width] and the stream [N, H], row i seeing row i's keys: (output [N, H], logits [N, C])."""
        n, x = len(qkv), residual.clone()
        output = self._linears[-1]
        wide, logits = torch.empty(n, 2 * self.inner), torch.empty(n, output.packed.out_features)
        q, s = _scratch(n * max(self.hidden, self.inner, self._mixed))
        fields = (
            qkv.contiguous().view(-1).numpy(), np.empty(n * self._mixed, np.float32), x.numpy(), keys.rows[:n],
            keys.places, pool.data_ptr(), self._behind, self._eps, self._shape, self._exit, wide.data_ptr(),
            logits.data_ptr(), int(q.ctypes.data), int(s.ctypes.data),
        )  # fmt: skip
        results, work = _attention_scratch(*self._scratch_for)
        size, barrier = self._team.size, self._team.barrier
        self._team.run(run_exit, [(i, size, *fields, results, work[i], barrier) for i in range(size)])
        return x, logits[:, : output.out_features]


def fits(linears: Sequence[object], hidden: int, head_dim: int) -> bool:
    """Whether a layer of these products can be one."""
    if not all(isinstance(linear, CpuLinear) and linear.bias is None for linear in linears):
        return False
    whole = all(
        isinstance(linear, CpuLinear) and linear.packed.out_features == linear.out_features for linear in linears[:-1]
    )
    return whole and hidden % GROUP == 0 and head_dim % 16 == 0


@cache
def _attention_scratch(
    kv_heads: int, dim: int, positions: int, threads: int
) -> tuple[NDArray[np.float32], list[NDArray[np.float32]]]:
    """Of all layers alike, which never run at the same time: results of spans of keys; of each thread its own."""
    results = aligned(4 * FEW * results_size(kv_heads, dim, positions)).view(np.float32)
    return results, [aligned(4 * scratch_size(kv_heads, dim)).view(np.float32) for _ in range(threads)]


def _kind_and_address(packed: PackedWeight) -> tuple[int, int, int]:
    return packed.kind, packed.address, packed.num_tiles


def _scratch(values: int) -> tuple[NDArray[np.uint8], NDArray[np.uint8]]:
    return aligned(values), aligned(values // GROUP * SCALE_BYTES)
