"""Log-probabilities for the client: the target's own, before penalties, bias and temperature, as OpenAI's are."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from server.sampling.rows import expand, spread
from server.spec.types import Layout, Verdict


@dataclass(slots=True)
class Logprobs:
    """Natural-log probabilities at the emitted positions of R rows, n alternatives each.

    `chosen` [R, width] float32 belongs to `Verdict.tokens`; `top_ids` [R, width, n] int64 and `top_logprobs`
    [R, width, n] float32 are the most probable tokens, most probable first. Entries at or past `num_emitted` are
    undefined.
    """

    chosen: Tensor
    top_ids: Tensor
    top_logprobs: Tensor


def emitted_logprobs(logits: Tensor, layout: Layout, verdict: Verdict, num_top: int) -> Logprobs:
    """Raw log-probabilities of what `verdict` emitted and of the `num_top` best; `logits` [T, V] are the model's own.

    Accepted drafts and bonus tokens alike are scored by the target at their own position.
    """
    logprobs = logits.log_softmax(-1)
    emitted = expand(verdict.tokens, layout).gather(1, layout.offsets[:, None])
    chosen = logprobs.gather(1, emitted).squeeze(1)
    top = logprobs.topk(min(num_top, logprobs.shape[1]), dim=-1)
    return Logprobs(spread(chosen, layout), spread(top.indices, layout), spread(top.values, layout))
