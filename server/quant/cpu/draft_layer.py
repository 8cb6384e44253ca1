"""A drafting head's one decoder layer around its attention, each half one compiled call of the team.

A draft is a handful of small products: called one by one, waking threads and torch's own calls cost more than they do.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from server.quant.cpu.activations import GROUP, SCALE_BYTES, quantize_gated_rows, quantize_normed_rows, quantize_rows
from server.quant.cpu.attention import rotate_head
from server.quant.cpu.barrier import wait
from server.quant.cpu.linear import CpuLinear
from server.quant.cpu.product import PackedWeight, aligned, multiply
from server.quant.cpu.step import share
from server.quant.cpu.team import team
from server.quant.cpu.vectors import jit


@jit
def run_entrance(
    thread, threads, table, token_ids, x, norms, eps, groups, qkv, out, heads, dim, rotations, positions, q, s, barrier
):  # fmt: skip
    """Out [N, width] = the layer's projections of [norm of the tokens' embeddings | norm of x], heads rotated.

    table: address of the embedding [V, H]; x: address of [N, H]; norms: addresses of both norms' weights; groups: of H;
    qkv: kind, address, tiles and outputs of the weight; heads: how many are rotated, those of queries and keys.
    """
    n, stride = len(token_ids), groups * 128
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
    first, end = share(n * heads, thread, threads)
    for at in range(first, end):
        head = out + at // heads * qkv[3] * 4 + at % heads * dim * 4
        rotate_head(head, rotations + positions[at // heads] * dim * 4, head, dim)
    wait(barrier, threads)


@jit
def run_exit(thread, threads, n, mixed, x, norms, eps, shape, weights, wide, logits, q, s, barrier):
    """X [N, H] += attention's result times `out`, then the feed-forward layer; logits [N, C] of the normed x.

    shape: groups of `mixed`, of H, of the inner width. weights: kind, address, tiles and outputs of `out`, `gate_up`,
    `down` and the output layer, a row each.
    """
    wide_groups, groups, inner_groups = shape[0], shape[1], shape[2]
    stride = groups * 128
    first, end = share(n * wide_groups, thread, threads)
    quantize_rows(mixed, wide_groups * 128, wide_groups, q, s, first, end)
    wait(barrier, threads)
    w = weights[0]
    first, end = share(w[2], thread, threads)
    multiply(w[0], w[1], q, s, wide_groups, x, stride, n, 1, first, end)
    wait(barrier, threads)
    first, end = share(n * groups, thread, threads)
    quantize_normed_rows(x, stride, norms[0], eps, groups, q, s, first, end)
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
    multiply(w[0], w[1], q, s, inner_groups, x, stride, n, 1, first, end)
    wait(barrier, threads)
    first, end = share(n * groups, thread, threads)
    quantize_normed_rows(x, stride, norms[1], eps, groups, q, s, first, end)
    wait(barrier, threads)
    w = weights[3]
    first, end = share(w[2], thread, threads)
    multiply(w[0], w[1], q, s, groups, logits, w[3] * 4, n, 0, first, end)
    wait(barrier, threads)


class DraftLayer:
    """The layer's products, norms and rotation. Results are those of the parts to the rounding of float32 sums."""

    def __init__(
        self,
        table: Tensor,
        norms: Sequence[Tensor],
        eps: float,
        linears: Sequence[CpuLinear],
        heads: tuple[int, int],
        rotations: Tensor,
    ) -> None:
        """`norms`: of embeddings, of what is handed over, behind attention, before the output layer, float32 [H].
        `linears`: qkv [width, 2 H], out, gate_up, down, output layer; none but the last may be padded (`fits`).
        `heads`: how many are rotated, those of queries and keys; dimension of one. `rotations` [P, D / 2] complex64.
        """
        self._table, self._norms, self._eps, self._linears = table, [n.contiguous() for n in norms], eps, list(linears)
        self._heads, self._rotations = heads, rotations
        self.hidden, self.inner = table.shape[1], linears[3].in_features
        self._qkv, *rest = ([*_kind_and_address(linear.packed), linear.packed.out_features] for linear in linears)
        self._entrance = np.array(self._qkv, dtype=np.int64)
        self._exit = np.array(rest, dtype=np.int64)
        self._shape = np.array([linears[1].in_features, self.hidden, self.inner], dtype=np.int64) // GROUP
        addresses = [norm.data_ptr() for norm in self._norms]
        self._ahead, self._behind = np.array(addresses[:2], dtype=np.int64), np.array(addresses[2:], dtype=np.int64)
        self._team = team(torch.get_num_threads())

    def enter(self, token_ids: Tensor, x: Tensor, positions: Tensor) -> Tensor:
        """Queries, keys and values [N, width] of tokens [N]; `x` [N, H] is handed over, `positions` [N]."""
        x, n = x.contiguous(), len(token_ids)
        out = torch.empty(n, self._linears[0].out_features)
        q, s = _scratch(n * 2 * self.hidden)
        ids, where = (np.ascontiguousarray(each.numpy()) for each in (token_ids, positions))
        fields = (
            self._table.data_ptr(), ids, x.data_ptr(), self._ahead, self._eps, self.hidden // GROUP, self._entrance,
            out.data_ptr(), *self._heads, self._rotations.data_ptr(), where, int(q.ctypes.data), int(s.ctypes.data),
            self._team.barrier,
        )  # fmt: skip
        size = self._team.size
        self._team.run(run_entrance, [(i, size, *fields) for i in range(size)])
        return out

    def leave(self, mixed: Tensor, residual: Tensor) -> tuple[Tensor, Tensor]:
        """Attention's result [N, heads * D] and the residual stream [N, H] -> (the layer's output [N, H], logits)."""
        mixed, x, n = mixed.contiguous(), residual.clone(), len(mixed)
        output = self._linears[-1]
        wide, logits = torch.empty(n, 2 * self.inner), torch.empty(n, output.packed.out_features)
        q, s = _scratch(n * max(self.hidden, self.inner, mixed.shape[1]))
        fields = (
            n, mixed.data_ptr(), x.data_ptr(), self._behind, self._eps, self._shape, self._exit, wide.data_ptr(),
            logits.data_ptr(), int(q.ctypes.data), int(s.ctypes.data), self._team.barrier,
        )  # fmt: skip
        size = self._team.size
        self._team.run(run_exit, [(i, size, *fields) for i in range(size)])
        return x, logits[:, : output.out_features]


def fits(linears: Sequence[object], hidden: int, head_dim: int) -> bool:
    """Whether a layer of these products can be one."""
    if not all(isinstance(linear, CpuLinear) and linear.bias is None for linear in linears):
        return False
    whole = all(
        isinstance(linear, CpuLinear) and linear.packed.out_features == linear.out_features for linear in linears[:-1]
    )
    return whole and hidden % GROUP == 0 and head_dim % 16 == 0


def _kind_and_address(packed: PackedWeight) -> tuple[int, int, int]:
    return packed.kind, packed.address, packed.num_tiles


def _scratch(values: int) -> tuple[np.ndarray, np.ndarray]:
    return aligned(values), aligned(values // GROUP * SCALE_BYTES)
