"""top_k, top_p and min_p, in this order, as one threshold on the processed logit.

- top_k keeps tokens whose logit is at least the k-th largest.
- top_p (Holtzman et al. 2020) keeps the smallest set of most probable tokens, of the distribution that top_k left,
  whose mass reaches top_p.
- min_p keeps tokens whose probability is at least min_p times that of the most probable one.

Tokens with exactly the threshold's logit are all kept, whatever their number; the most probable token always is.

Masses are 64-bit integers in units of 2**-40 of the most probable token. Sums of integers do not depend on the order
of addition, so a threshold is the same for any batch, any number of threads and any device's way to reduce.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from server.sampling.distribution import Processed
from server.sampling.rows import expand
from server.sampling.state import SamplingBatch
from server.spec.types import Layout

_CANDIDATES = (256, 1024)
_MASS_UNIT = 2.0**40
_INF = float("inf")


@dataclass(slots=True)
class _Filters:
    """Temperature-scaled logits [T, V] and the filters of their positions, each [T, 1]."""

    logits: Tensor
    top_k: Tensor
    top_p: Tensor
    min_p: Tensor
    any_top_p: bool
    any_min_p: bool

    def select(self, index: Tensor) -> _Filters:
        """The positions in `index` [N] only."""
        logits, top_k, top_p, min_p = (
            part.index_select(0, index) for part in (self.logits, self.top_k, self.top_p, self.min_p)
        )
        return _Filters(logits, top_k, top_p, min_p, self.any_top_p, self.any_min_p)

    def threshold(self, values: Tensor) -> tuple[Tensor, Tensor]:
        """Threshold [T, 1] on the logit, given each position's C largest logits, `values` [T, C] descending.

        Second result: whether C logits were enough to know it, [T, 1] bool (always so if C is the vocabulary).
        """
        num_values, vocab_size = values.shape[1], self.logits.shape[1]
        no_top_k = self.top_k >= vocab_size
        decided = no_top_k | (self.top_k <= num_values)
        kth = values.gather(1, self.top_k.clamp(max=num_values) - 1)
        threshold = torch.where(no_top_k, -_INF, kth)
        if self.any_top_p:
            nucleus, reached = self._nucleus(values, threshold)
            threshold = torch.maximum(threshold, nucleus)
            decided &= reached
        if self.any_min_p:
            threshold = torch.maximum(threshold, values[:, :1] + self.min_p.log())
        return threshold, decided

    def _nucleus(self, values: Tensor, threshold: Tensor) -> tuple[Tensor, Tensor]:
        """top_p's threshold within the tokens that top_k's left, and whether `values` reach that far; both [T, 1]."""
        mass = _mass(values, values[:, :1]).mul_(values >= threshold)
        running = mass.cumsum(1)
        total, known = self._total(values, threshold, running[:, -1:])
        wanted = self.top_p.double() * total
        is_off = self.top_p >= 1.0
        last = (running < wanted).sum(1, keepdim=True).clamp_(max=values.shape[1] - 1)
        nucleus = torch.where(is_off, -_INF, values.gather(1, last))
        return nucleus, is_off | (known & (running[:, -1:] >= wanted))

    def _total(self, values: Tensor, threshold: Tensor, mass: Tensor) -> tuple[Tensor, Tensor]:
        """Mass that top_k left and whether it is known, both [T, 1]; `mass` is what `values` hold of it."""
        if values.shape[1] == self.logits.shape[1]:
            return mass, torch.ones_like(mass, dtype=torch.bool)
        complete = values[:, -1:] < threshold  # else ties with the k-th, or everything, may go on past the last value
        if bool(complete.all()):
            return mass, complete
        everything = _mass(self.logits, values[:, :1]).sum(1, keepdim=True)
        return torch.where(complete, mass, everything), complete | (self.top_k >= self.logits.shape[1])


def filter_logits(logits: Tensor, layout: Layout, batch: SamplingBatch) -> Processed:
    """Filter temperature-scaled `logits` [T, V].

    On a GPU every row is sorted: fixed shapes, no sync. On the CPU, where a sort takes milliseconds a row and a look
    at a result costs nothing, the largest few hundred logits nearly always decide; rows that they leave
    undecided are decided by more of them, at last by all.
    """
    top_k, top_p, min_p = (expand(part, layout)[:, None] for part in (batch.top_k, batch.top_p, batch.min_p))
    filters = _Filters(logits, top_k, top_p, min_p, batch.any_top_p, batch.any_min_p)
    if logits.is_cuda:
        threshold, _ = filters.threshold(logits.sort(-1, descending=True).values)
        return Processed.dense(logits.masked_fill(logits < threshold, -_INF))
    vocab_size = logits.shape[1]
    values, ids, threshold = _decide(filters, [*(size for size in _CANDIDATES if size < vocab_size), vocab_size])
    if bool((values[:, -1:] < threshold).all()):
        return Processed(values.masked_fill_(values < threshold, -_INF), vocab_size, ids)
    return Processed.dense(torch.where(logits < threshold, -_INF, logits))


def _decide(filters: _Filters, sizes: list[int]) -> tuple[Tensor, Tensor, Tensor]:
    """Largest `sizes[0]` logits [T, C], their ids [T, C], the exact thresholds [T, 1]. CPU only: looks at results."""
    largest = filters.logits.topk(sizes[0]) if len(sizes) > 1 else filters.logits.sort(-1, descending=True)
    threshold, decided = filters.threshold(largest.values)
    undecided = decided.logical_not().squeeze(1).nonzero().squeeze(1)
    if len(sizes) > 1 and undecided.numel():
        _, _, exact = _decide(filters.select(undecided), sizes[1:])
        threshold = threshold.index_copy(0, undecided, exact)
    return largest.values, largest.indices, threshold


def _mass(logits: Tensor, largest: Tensor) -> Tensor:
    return (logits - largest).exp_().mul_(_MASS_UNIT).to(torch.int64)
