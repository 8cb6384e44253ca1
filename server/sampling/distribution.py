"""Processed logits: the distribution that is sampled, and how it is sampled."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from server.sampling.rng import gumbel

_BLOCK = 256


@dataclass(slots=True)
class Processed:
    """Processed logits [T, C] float32 of T positions: -inf where a token is filtered out.

    Column c of position t is token `ids[t, c]` (or `ids[c]`, if `ids` is [C]); `ids` None means that C is the
    vocabulary and column c is token c. Candidates (`ids` given) hold every token that survived the filters, so that
    noise is drawn for a few dozen tokens instead of the vocabulary; short rows are padded with -inf, of any id. Greedy
    rows hold unscaled logits and may be filtered down to their maximum.
    """

    logits: Tensor
    vocab_size: int
    ids: Tensor | None = None

    @staticmethod
    def dense(logits: Tensor) -> Processed:
        """Processed logits over the whole vocabulary; `logits` [T, V]."""
        return Processed(logits, logits.shape[1])

    def to_dense(self) -> Tensor:
        """The same logits over the whole vocabulary, [T, V]."""
        if self.ids is None:
            return self.logits
        full = self.logits.new_full((self.logits.shape[0], self.vocab_size), -float("inf"))
        return full.scatter_reduce_(1, self.ids.expand(self.logits.shape), self.logits, "amax")

    def probs(self, greedy: Tensor | None = None) -> Tensor:
        """Probabilities [T, V] float32; rows with `greedy` [T] bool are one-hot at their maximum."""
        probs = self.logits.softmax(-1)
        if self.ids is not None:
            full = probs.new_zeros(probs.shape[0], self.vocab_size)
            probs = full.scatter_add_(1, self.ids.expand(probs.shape), probs)
        if greedy is None:
            return probs
        one_hot = torch.zeros_like(probs).scatter_(1, self.argmax()[:, None], 1.0)
        return torch.where(greedy[:, None], one_hot, probs)

    def argmax(self) -> Tensor:
        """The most probable token [T] int64, the lowest id among equals."""
        return self._best(self.logits)

    def sample(self, keys: Tensor, greedy: Tensor | None = None) -> Tensor:
        """One token a position, [T] int64: argmax(logits + Gumbel noise of `keys` [T, 2]), a draw from softmax.

        Rows with `greedy` [T] bool get no noise.
        """
        noise = gumbel(keys, self.vocab_size if self.ids is None else self.ids)
        if greedy is not None:
            noise.mul_(greedy.logical_not()[:, None])
        return self._best(noise.add_(self.logits))

    def _best(self, scores: Tensor) -> Tensor:
        if self.ids is None:
            return _argmax(scores)
        # Columns are in any order: the tie must go where it would go over the whole vocabulary.
        is_best = scores == scores.amax(-1, keepdim=True)
        return torch.where(is_best, self.ids, self.vocab_size).amin(-1)


def _argmax(scores: Tensor) -> Tensor:
    """`scores.argmax(-1)` of [T, V], first among equals.

    torch's own is scalar code on the CPU, ten times slower than amax: find the best block first, then look inside.
    """
    num_rows, width = scores.shape
    if not scores.is_cpu or width % _BLOCK:
        return scores.argmax(-1)
    blocks = scores.view(num_rows, -1, _BLOCK)
    best = blocks.amax(-1).argmax(-1)
    inside = blocks[torch.arange(num_rows, device=scores.device), best].argmax(-1)
    return inside.add_(best, alpha=_BLOCK)
