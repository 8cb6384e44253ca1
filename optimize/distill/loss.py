"""The loss over the vocabulary, in chunks: logits of all tokens and steps at once would not fit.

    targets t = target's probabilities at the draft vocabulary + beta at its argmax (where that can be drafted)
    loss      = - sum_c t_c log q_c = m log sum exp z - sum_c t_c z_c,   m = sum_c t_c
    gradient  = m softmax(z) - t

The gradient is as cheap as the loss while a chunk's logits are there, so it is computed in the forward pass: three
matrix products instead of the four of recomputing them (as in Hsu et al. 2024, "Liger Kernel", arXiv 2410.10989,
section 3.2).
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from optimize.distill.target import Teacher


def chunk_rows(vocab_size: int, device: torch.device) -> int:
    """Rows of float32 logits [n, vocab_size] that take about 512 MB on a GPU, 64 MB on a CPU."""
    return max(16, (2**27 if device.type == "cuda" else 2**24) // vocab_size)


class Targets:
    """What the head is to say at each of N positions: `mass` [N, C], and `labels` [N], the draft id of the target's
    most probable token or -1."""

    def __init__(self, mass: Tensor, labels: Tensor) -> None:
        self.mass, self.labels = mass, labels

    @staticmethod
    @torch.no_grad()
    def of(teacher: Teacher, normed: Tensor, target_ids: Tensor, hard: float, dtype: torch.dtype) -> Targets:
        """From what the target's output layer reads, `normed` [N, H]. Mass outside the draft vocabulary is dropped."""
        vocab_size, size = teacher.vocab_size, target_ids.shape[0]
        device = normed.device
        column = torch.full((vocab_size,), -1, dtype=torch.int64, device=device)
        column[target_ids] = torch.arange(size, device=device)
        mass = torch.empty(normed.shape[0], size, dtype=dtype, device=device)
        labels = torch.empty(normed.shape[0], dtype=torch.int64, device=device)
        step = chunk_rows(vocab_size, device)
        for start in range(0, normed.shape[0], step):
            part = slice(start, start + step)
            logits = teacher.logits(normed[part])
            if logits.is_cuda:
                _kernels().target_rows(logits, target_ids, column, hard, mass[part], labels[part])
                continue
            label = labels[part] = column[logits.argmax(-1)]
            probs = logits.softmax(-1)
            chosen = probs if size == vocab_size else probs[:, target_ids]
            extra = torch.where(label >= 0, hard, 0.0)[:, None]
            mass[part] = chosen.scatter_add_(1, label.clamp(min=0)[:, None], extra.to(chosen.dtype))
        return Targets(mass, labels)


def loss_rows_(
    logits: Tensor, mass: Tensor, at: Tensor, labels: Tensor, weights: Tensor, grad: bool
) -> tuple[Tensor, Tensor]:
    """The reference of `loss_kernels.loss_rows_`."""
    z, aim, label = logits.float(), mass[at].float(), labels[at]
    chosen = z.gather(1, label.clamp(min=0)[:, None]).squeeze(1)
    agrees = (chosen >= z.amax(-1)) & (label >= 0)
    whole, amount = z.logsumexp(-1), aim.sum(-1)
    losses = weights * (amount * whole - torch.linalg.vecdot(aim, z))
    if grad:
        logits.copy_(z.sub(whole[:, None]).exp_().mul_(amount[:, None]).sub_(aim).mul_(weights[:, None]))
    return losses, agrees


def _kernels() -> Any:
    from optimize.distill import loss_kernels  # needs triton, which a CPU's torch comes without

    return loss_kernels


class _VocabularyLoss(torch.autograd.Function):
    """sum_n w_n loss_n of normed [N, H] and the output layer [C, H]; also says where the best draft is the label."""

    @staticmethod
    def forward(
        ctx: Any, normed: Tensor, head: Tensor, mass: Tensor, labels: Tensor, at: Tensor, weights: Tensor
    ) -> tuple[Tensor, Tensor]:
        matrix = head.to(normed.dtype)
        total = torch.zeros((), device=normed.device)
        agrees = torch.empty(normed.shape[0], dtype=torch.bool, device=normed.device)
        needs_normed, needs_head = ctx.needs_input_grad[:2]
        grad_normed = torch.empty_like(normed) if needs_normed else None
        grad_head = torch.zeros_like(head) if needs_head else None
        step = chunk_rows(head.shape[0], normed.device)
        for start in range(0, normed.shape[0], step):
            part = slice(start, start + step)
            logits = F.linear(normed[part], matrix)
            rows = _kernels().loss_rows_ if logits.is_cuda else loss_rows_
            losses, agrees[part] = rows(logits, mass, at[part], labels, weights[part], needs_normed or needs_head)
            total += losses.sum()
            grad = logits
            if grad_normed is not None:
                grad_normed[part] = grad @ matrix
            if grad_head is not None:
                grad_head += grad.t() @ normed[part]
        ctx.grads = (grad_normed, grad_head)
        ctx.mark_non_differentiable(agrees)
        return total, agrees

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, scale: Tensor, _: Tensor) -> tuple[Tensor | None, ...]:
        normed, head = ctx.grads
        return (
            None if normed is None else normed * scale.to(normed.dtype),
            None if head is None else head * scale,
            None,
            None,
            None,
            None,
        )


def vocabulary_loss(
    normed: Tensor, head: Tensor, targets: Targets, at: Tensor, weights: Tensor
) -> tuple[Tensor, Tensor]:
    """(sum of weighted losses, agrees [N] bool) of N rows whose targets are rows `at` [N]; `weights` [N] float32."""
    total, agrees = _VocabularyLoss.apply(  # type: ignore[no-untyped-call]
        normed, head, targets.mass, targets.labels, at, weights
    )
    return total, agrees
