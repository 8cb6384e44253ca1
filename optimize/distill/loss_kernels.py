"""The loss over the vocabulary on a GPU: what `loss.py` does in a dozen passes over a chunk's logits, in two.

A row of logits is read once for its maximum, its sum and its products with the targets, and once more (from the cache)
for the gradient, which takes its place. Imported only where triton runs.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

_BLOCK = 4096


@triton.jit
def _loss_rows(
    logits, mass, at, labels, weights, losses, agrees, size, stride, mass_stride,
    GRAD: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    place = tl.load(at + row)
    label = tl.load(labels + place)
    weight = tl.load(weights + row)
    source, aims = logits + row * stride, mass + place * mass_stride
    chosen = tl.load(source + tl.maximum(label, 0)).to(tl.float32)  # before any warp writes a gradient there
    best, total = -float("inf"), 0.0
    amount, product = 0.0, 0.0
    for start in range(0, size, BLOCK):
        columns = start + tl.arange(0, BLOCK)
        inside = columns < size
        z = tl.load(source + columns, mask=inside, other=-float("inf")).to(tl.float32)
        aim = tl.load(aims + columns, mask=inside, other=0.0).to(tl.float32)
        higher = tl.maximum(best, tl.max(z, 0))
        total = total * tl.exp(best - higher) + tl.sum(tl.exp(z - higher), 0)
        best = higher
        amount += tl.sum(aim, 0)
        product += tl.sum(aim * tl.where(inside, z, 0.0), 0)
    whole = best + tl.log(total)
    tl.store(losses + row, weight * (amount * whole - product))
    tl.store(agrees + row, (label >= 0) & (chosen >= best))
    if GRAD:
        for start in range(0, size, BLOCK):
            columns = start + tl.arange(0, BLOCK)
            inside = columns < size
            z = tl.load(source + columns, mask=inside, other=-float("inf")).to(tl.float32)
            aim = tl.load(aims + columns, mask=inside, other=0.0).to(tl.float32)
            grad = (tl.exp(z - whole) * amount - aim) * weight
            tl.store(source + columns, grad.to(logits.dtype.element_ty), mask=inside)


def loss_rows_(
    logits: Tensor, mass: Tensor, at: Tensor, labels: Tensor, weights: Tensor, grad: bool
) -> tuple[Tensor, Tensor]:
    """(weighted losses [n] float32, agrees [n] bool) of logits [n, C]; with `grad`, logits become their gradient.

    Targets of row i are row `at` [n] of mass [N, C] and labels [N]; `weights` [n] float32.
    """
    rows, size = logits.shape
    losses = torch.empty(rows, dtype=torch.float32, device=logits.device)
    agrees = torch.empty(rows, dtype=torch.bool, device=logits.device)
    _loss_rows[(rows,)](
        logits, mass, at, labels, weights, losses, agrees, size, logits.stride(0), mass.stride(0),
        GRAD=grad, BLOCK=min(_BLOCK, triton.next_power_of_2(size)), num_warps=8,
    )  # fmt: skip
    return losses, agrees


@triton.jit
def _target_rows(
    logits, ids, column, mass, labels, vocab_size, size, hard, stride, mass_stride, BLOCK: tl.constexpr
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    source = logits + row * stride
    best, total = -float("inf"), 0.0
    top = 0
    for start in range(0, vocab_size, BLOCK):
        columns = start + tl.arange(0, BLOCK)
        z = tl.load(source + columns, mask=columns < vocab_size, other=-float("inf")).to(tl.float32)
        peak = tl.max(z, 0)
        first = tl.min(tl.where(z == peak, columns, vocab_size), 0)
        top = tl.where(peak > best, first, top)
        higher = tl.maximum(best, peak)
        total = total * tl.exp(best - higher) + tl.sum(tl.exp(z - higher), 0)
        best = higher
    whole = best + tl.log(total)
    label = tl.load(column + top)
    tl.store(labels + row, label)
    for start in range(0, size, BLOCK):
        columns = start + tl.arange(0, BLOCK)
        inside = columns < size
        token = tl.load(ids + columns, mask=inside, other=0)
        z = tl.load(source + token, mask=inside, other=-float("inf")).to(tl.float32)
        share = tl.exp(z - whole) + tl.where(columns == label, hard, 0.0)
        tl.store(mass + row * mass_stride + columns, share.to(mass.dtype.element_ty), mask=inside)


def target_rows(logits: Tensor, ids: Tensor, column: Tensor, hard: float, mass: Tensor, labels: Tensor) -> None:
    """Writes mass [n, C] and labels [n] (`optimize.distill.loss.Targets`) of the target's logits [n, V].

    `ids` [C] are the target's ids of the draft tokens, `column` [V] where a token lies among them, -1: it does not.
    """
    rows, vocab_size = logits.shape
    _target_rows[(rows,)](
        logits, ids, column, mass, labels, vocab_size, len(ids), hard, logits.stride(0), mass.stride(0),
        BLOCK=min(_BLOCK, triton.next_power_of_2(vocab_size)), num_warps=8,
    )  # fmt: skip
