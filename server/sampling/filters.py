"""top_k, top_p and min_p, in this order, as one threshold on the processed logit.

- top_k keeps tokens whose logit is at least the k-th largest.
- top_p (Holtzman et al. 2020) keeps the smallest set of most probable tokens, of the distribution that top_k left,
  whose mass reaches top_p.
- min_p keeps tokens whose probability is at least min_p times that of the most probable one.

Tokens with exactly the threshold's logit are all kept, whatever their number; the most probable token always is.

Running masses are 64-bit integers in units of 2**-40 of the most probable token: sums of integers do not depend on the
order of addition, so a threshold is the same for any batch, any number of threads and any device's way to scan.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from server.sampling.distribution import Processed
from server.sampling.rows import expand
from server.sampling.state import SamplingBatch
from server.spec.types import Layout

_CANDIDATES = (64, 256, 1024)
_BLOCK = 64
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
        everything = _MASS_UNIT / self.logits.softmax(-1).amax(-1, keepdim=True).double()
        return torch.where(complete, mass.double(), everything), complete | (self.top_k >= self.logits.shape[1])


def filter_logits(logits: Tensor, layout: Layout, batch: SamplingBatch) -> Processed:
    """Filter temperature-scaled `logits` [T, V].

    On a GPU every row is sorted: fixed shapes, no sync. On the CPU, where a sort takes milliseconds a row and a look
    at a result costs nothing, a few dozen of the largest logits nearly always decide; rows that they leave undecided
    are decided by more of them, at last by all. If every row is filtered, the result is those few candidates.
    """
    top_k, top_p, min_p = (expand(part, layout)[:, None] for part in (batch.top_k, batch.top_p, batch.min_p))
    filters = _Filters(logits, top_k, top_p, min_p, batch.any_top_p, batch.any_min_p)
    sizes = [size for size in _CANDIDATES if size < logits.shape[1]] if logits.is_cpu else []
    threshold, candidates = _decide(filters, sizes, batch.all_filtered)
    return Processed.dense(_drop_below(logits, threshold)) if candidates is None else candidates


def _decide(filters: _Filters, sizes: list[int], wants_candidates: bool) -> tuple[Tensor, Processed | None]:
    """Exact thresholds [T, 1] from the `sizes[0]` largest logits, row by row from more where they do not suffice.

    Also the tokens that survive, if wanted and if no row needed a sort. With no sizes: a sort, without a sync.
    """
    if not sizes:
        return filters.threshold(filters.logits.sort(-1, descending=True).values)[0], None
    values, ids = _largest(filters.logits, sizes[0])
    threshold, decided = filters.threshold(values)
    candidates = None
    if wants_candidates:
        decided &= (values[:, -1:] < threshold) | values[:, -1:].isneginf()  # no survivor is past the last value
        candidates = Processed(values.masked_fill(values < threshold, -_INF), filters.logits.shape[1], ids)
    rest = decided.logical_not().squeeze(1).nonzero().squeeze(1)
    if rest.numel() == 0:
        return threshold, candidates
    rest_threshold, more = _decide(filters.select(rest), sizes[1:], wants_candidates)
    threshold = threshold.index_copy(0, rest, rest_threshold)
    return threshold, None if candidates is None or more is None else _replace_rows(candidates, rest, more)


def _largest(logits: Tensor, num: int) -> tuple[Tensor, Tensor]:
    """`logits.topk(num)`: values and ids [T, num], descending.

    The `num` largest lie in the `num` blocks with the largest maxima. Finding those is vector code; torch's topk
    over the whole vocabulary is a branch per element, which the data makes unpredictable.
    """
    num_rows, vocab_size = logits.shape
    num_blocks = vocab_size // _BLOCK
    if vocab_size % _BLOCK or num_blocks < num:
        values, ids = logits.topk(num)
        return values, ids
    blocks = logits.view(-1, _BLOCK)
    best = blocks.amax(-1).view(num_rows, num_blocks).topk(num, sorted=False).indices
    row_starts = torch.arange(0, num_rows * num_blocks, num_blocks)[:, None]
    values, at = blocks.index_select(0, (best + row_starts).view(-1)).view(num_rows, -1).topk(num)
    return values, best.gather(1, at // _BLOCK) * _BLOCK + at % _BLOCK


def _replace_rows(candidates: Processed, rows: Tensor, more: Processed) -> Processed:
    """`candidates` with `rows` [N] replaced by `more`, whose rows are longer; short ones are padded with -inf."""
    assert candidates.ids is not None and more.ids is not None
    grow = (0, more.logits.shape[1] - candidates.logits.shape[1])
    logits = F.pad(candidates.logits, grow, value=-_INF).index_copy_(0, rows, more.logits)
    return Processed(logits, candidates.vocab_size, F.pad(candidates.ids, grow).index_copy_(0, rows, more.ids))


def _drop_below(logits: Tensor, threshold: Tensor) -> Tensor:
    """-inf where `logits` [T, V] are below `threshold` [T, 1], else their very bits.

    Arithmetic, as a masked fill on the CPU is a branch per element: a negative difference becomes -inf, others 0.
    """
    if not logits.is_cpu:
        return logits.masked_fill(logits < threshold, -_INF)
    lowest = torch.finfo(logits.dtype).min
    below = (logits - threshold.clamp(min=lowest)).clamp_(max=0.0)
    return below.mul_(-lowest).mul_(-lowest).add_(logits)


def _mass(logits: Tensor, largest: Tensor) -> Tensor:
    return (logits - largest).exp_().mul_(_MASS_UNIT).to(torch.int64)
