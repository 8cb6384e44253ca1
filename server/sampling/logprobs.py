"""Log-probabilities for the client: the target's own, before penalties, bias and temperature, as OpenAI's are."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from server.sampling.rows import expand, spread
from server.spec.types import Layout, Verdict


@dataclass(slots=True)
class Logprobs:
    """Natural-log probabilities of tokens, n alternatives each.

    `chosen` [R, width] float32 belongs to `Verdict.tokens`; `top_ids` [R, width, n] int64 and `top_logprobs`
    [R, width, n] float32 are the most probable tokens, most probable first. Entries at or past `num_emitted` are
    undefined. Where T given tokens are scored, [T] takes the place of [R, width].
    """

    chosen: Tensor
    top_ids: Tensor
    top_logprobs: Tensor


def emitted_logprobs(logits: Tensor, layout: Layout, verdict: Verdict, num_top: int) -> Logprobs:
    """Raw log-probabilities of what `verdict` emitted and of the `num_top` best; `logits` [T, V] are the model's own.

    Accepted drafts and bonus tokens alike are scored by the target at their own position.
    """
    emitted = expand(verdict.tokens, layout).gather(1, layout.offsets[:, None]).squeeze(1)
    found = score(logits, emitted, num_top)
    return Logprobs(*(spread(part, layout) for part in (found.chosen, found.top_ids, found.top_logprobs)))


def score(logits: Tensor, tokens: Tensor, num_top: int) -> Logprobs:
    """Raw log-probabilities of `tokens` [T], one a position of `logits` [T, V], and of the `num_top` best there."""
    logprobs = logits.log_softmax(-1)
    chosen = logprobs.gather(1, tokens[:, None]).squeeze(1)
    top = logprobs.topk(min(num_top, logprobs.shape[1]), dim=-1)
    return Logprobs(chosen, top.indices, top.values)
