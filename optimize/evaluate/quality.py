"""Two networks read the same text: what they say of every token, and how far their distributions are apart."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from optimize.evaluate.bounds import Estimate, clustered
from optimize.evaluate.errors import EvaluateError
from optimize.evaluate.reader import Reader, steps
from optimize.evaluate.texts import Window

_ROWS_BYTES = 1 << 26
"""Of the float32 rows that are compared at once."""
Progress = Callable[[int, int], None]


@dataclass(frozen=True, slots=True)
class Positions:
    """One entry a predicted token, [N] each: log-probabilities of the text's own token in nats (float64), KL divergence
    base ‖ candidate in nats (float64), whether both have the same most likely token, and the token's cluster.

    Where `broken` the candidate's logits are not finite: its log-probability is -inf, the divergence +inf.
    """

    base: NDArray[np.float64]
    candidate: NDArray[np.float64]
    divergence: NDArray[np.float64]
    same: NDArray[np.bool_]
    broken: NDArray[np.bool_]
    clusters: NDArray[np.int64]

    @property
    def difference(self) -> NDArray[np.float64]:
        """How much less likely the text is to the candidate, nats."""
        return self.base - self.candidate


@dataclass(frozen=True, slots=True)
class Quality:
    """`perplexity_ratio` and `top1_agreement` with the ends of their one-sided intervals; divergences in nats."""

    num_tokens: int
    num_broken: int
    base_perplexity: float
    candidate_perplexity: float
    perplexity_ratio: Estimate
    divergence_mean: float
    divergence_p99: float
    top1_agreement: Estimate


def read_both(base: Reader, candidate: Reader, windows: Sequence[Window], tokens: int, progress: Progress) -> Positions:
    """One pass: both networks read a step, the step is compared, its logits are dropped. `tokens` a step at most.

    Raises EvaluateError where the base's logits are not finite.
    """
    return read_all(base, [candidate], windows, tokens, progress)[0]


def read_all(
    base: Reader, candidates: Sequence[Reader], windows: Sequence[Window], tokens: int, progress: Progress
) -> list[Positions]:
    """`read_both` for several candidates in one pass of the base."""
    found: list[list[tuple[Tensor, ...]]] = [[] for _ in candidates]
    clusters: list[NDArray[np.int64]] = []
    total, done = sum(w.num_tokens for w in windows), 0
    for step in steps(windows, tokens):
        read = [(windows[i].cluster, windows[i].ids[1:][step.start : step.end]) for i in step.group]
        targets = torch.from_numpy(np.concatenate([ids for _, ids in read]))
        clusters += [np.full(len(ids), cluster, dtype=np.int64) for cluster, ids in read]
        mine = base.logits(windows, step)
        for parts, candidate in zip(found, candidates, strict=True):
            theirs = candidate.logits(windows, step)
            parts.append(compared(mine, theirs.to(mine.device), targets.to(mine.device)))
        done += len(targets)
        progress(done, total)
    return [_positions(parts, np.concatenate(clusters)) for parts in found]


def _positions(parts: Sequence[tuple[Tensor, ...]], clusters: NDArray[np.int64]) -> Positions:
    ours, others, divergence, same, broken = (torch.cat(part).numpy() for part in zip(*parts, strict=True))
    return Positions(ours, others, divergence, same, broken, clusters)


@torch.inference_mode()
def compared(base: Tensor, candidate: Tensor, targets: Tensor) -> tuple[Tensor, ...]:
    """Of float32 logits [N, V] both and `targets` [N]: the fields of Positions but `clusters`, on the CPU."""
    rows = max(1, _ROWS_BYTES // (4 * base.shape[1]))
    parts = [
        _compared(*chunk) for chunk in zip(base.split(rows), candidate.split(rows), targets.split(rows), strict=True)
    ]
    return tuple(torch.cat(part).cpu() for part in zip(*parts, strict=True))


def _compared(base: Tensor, candidate: Tensor, targets: Tensor) -> tuple[Tensor, ...]:
    # -inf is a legal logit (a masked token); a row's largest one is what has to be finite, and no NaN is any row's.
    if not bool(base.amax(-1).isfinite().all()):
        raise EvaluateError("the base model's logits are not finite; nothing can be held against it")
    broken = ~candidate.amax(-1).isfinite()
    same = (base.argmax(-1) == candidate.argmax(-1)) & ~broken
    ours, others = base.log_softmax(-1), candidate.log_softmax(-1)
    p = ours.exp()
    divergence = torch.where(p > 0, p * (ours - others), 0.0).sum(-1, dtype=torch.float64)
    at = targets.unsqueeze(1)
    mine, theirs = (logs.gather(1, at).squeeze(1).double() for logs in (ours, others))
    theirs = theirs.masked_fill(broken, -math.inf)
    divergence = divergence.clamp_min(0.0).masked_fill(broken, math.inf)  # rounding can go below zero
    return mine, theirs, divergence, same, broken


def summary(positions: Positions, confidence: float) -> Quality:
    """The numbers of a report. The ratio's interval is that of the mean difference, exponentiated."""
    difference = positions.difference
    finite = bool(np.isfinite(difference).all())
    mean = clustered(difference, positions.clusters, confidence) if finite else _unbounded(len(set(positions.clusters)))
    return Quality(
        num_tokens=len(difference),
        num_broken=int(positions.broken.sum()),
        base_perplexity=_exp(-float(positions.base.mean())),
        candidate_perplexity=_exp(-float(positions.candidate.mean())),
        perplexity_ratio=Estimate(_exp(mean.mean), mean.error, _exp(mean.low), _exp(mean.high), mean.num_clusters),
        divergence_mean=float(positions.divergence.mean()),
        divergence_p99=float(np.quantile(positions.divergence, 0.99, method="higher")),
        top1_agreement=clustered(positions.same, positions.clusters, confidence),
    )


def _unbounded(groups: int) -> Estimate:
    return Estimate(math.inf, math.inf, math.inf, math.inf, groups)


def _exp(x: float) -> float:
    """e^x, infinite where it is too large for a float."""
    return math.exp(x) if x < 700 else math.inf
