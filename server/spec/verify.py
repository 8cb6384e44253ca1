"""Verification: which drafts stand, and the one new token after them. The torch reference.

Both rules emit tokens whose joint distribution is exactly that of plain sampling from the processed target.

- `coupled`: the token of a position is argmax(log p + Gumbel noise), a function of the target alone (the Gumbel-max
  trick; as a coupling of draft and target see Daliri et al. 2025, "Coupling without communication and drafter-invariant
  speculative decoding"). Drafts decide only how many positions are emitted at once.
- `ratio`: rejection sampling of Leviathan et al. 2023, "Fast inference from transformers via speculative decoding", and
  Chen et al. 2023, "Accelerating large language model decoding with speculative sampling".

A greedy row has the one-hot distribution at its argmax under either rule.
"""

from __future__ import annotations

import torch
from torch import Tensor

from server.config import VERIFICATION_RULES
from server.sampling.distribution import Processed
from server.sampling.rng import ACCEPT, DRAFT, RESIDUAL, TARGET, noise_keys, uniform
from server.sampling.rows import expand, first_positions, spread
from server.sampling.state import SamplingBatch
from server.spec.types import Drafts, Layout, Verdict


def verify(
    processed: Processed, layout: Layout, drafts: Drafts, batch: SamplingBatch, num_tokens: Tensor, rule: str
) -> Verdict:
    """Accepted prefix and next token of every row.

    `processed` covers the T positions of `layout`. `num_tokens` [R] int64 is how many tokens of a row are known, so
    the token of offset j has the absolute position `num_tokens + j`, on which its noise depends. `rule` is
    "coupled" or "ratio". Without drafts this is plain sampling.
    """
    _check_rule(rule)
    if batch.all_greedy:
        return _match(processed.argmax(), layout, drafts)
    positions = expand(num_tokens, layout) + layout.offsets
    if rule == "coupled":
        keys = noise_keys(expand(batch.seeds, layout), expand(batch.choices, layout), positions, TARGET)
        greedy = expand(batch.greedy, layout) if batch.any_greedy else None
        return _match(processed.sample(keys, greedy), layout, drafts)
    return _reject(processed, layout, drafts, batch, positions)


def draft_token(
    processed: Processed, batch: SamplingBatch, positions: Tensor, rule: str, vocab_ids: Tensor | None = None
) -> tuple[Tensor, Tensor | None]:
    """Draw one draft token a row from a drafter's own distribution: tokens [R] int64 and q [R, V] float32.

    `processed` [R, C] are the drafter's processed logits, `positions` [R] int64 the absolute positions drafted. A
    drafter with a reduced vocabulary passes the target's id of each of its tokens, `vocab_ids` [C], and
    `processed.vocab_size` is then the target's; tokens and q are in target ids.

    Under `coupled` the draft uses the noise with which the target will choose at that position, and needs no q
    (None). Under `ratio` it has noise of its own, and q is None if every row is greedy: a point mass. Exactness of
    `ratio` wants q as drawn from: whether a draft is kept (`Drafts.num_valid`) may depend on what precedes it, never on
    the token drawn.
    """
    _check_rule(rule)
    if vocab_ids is not None:
        ids = vocab_ids if processed.ids is None else vocab_ids[processed.ids]
        processed = Processed(processed.logits, processed.vocab_size, ids)
    if batch.all_greedy:
        return processed.argmax(), None
    greedy = batch.greedy if batch.any_greedy else None
    keys = noise_keys(batch.seeds, batch.choices, positions, TARGET if rule == "coupled" else DRAFT)
    tokens = processed.sample(keys, greedy)
    return tokens, None if rule == "coupled" else processed.probs(greedy)


def _check_rule(rule: str) -> None:
    if rule not in VERIFICATION_RULES:
        raise ValueError(f"verification: {rule!r} is not valid; use one of {', '.join(VERIFICATION_RULES)}")


def _match(target: Tensor, layout: Layout, drafts: Drafts) -> Verdict:
    """The longest prefix of the drafts that is what the target emits anyway; `target` [T]."""
    tokens = spread(target, layout)
    if layout.width == 1:
        return _verdict(tokens, torch.zeros_like(drafts.num_valid))
    agrees = tokens[:, :-1] == drafts.tokens[:, : layout.width - 1]
    return _verdict(tokens, _prefix_length(agrees, drafts))


def _reject(processed: Processed, layout: Layout, drafts: Drafts, batch: SamplingBatch, positions: Tensor) -> Verdict:
    """Accept draft d with probability min(1, p(d) / q(d)); sample max(p - q, 0) where the first one falls."""
    p = processed.probs(expand(batch.greedy, layout) if batch.any_greedy else None)
    seeds, choices = expand(batch.seeds, layout), expand(batch.choices, layout)
    tokens = torch.nn.functional.pad(drafts.tokens[:, : layout.width - 1], (0, 1))
    p_draft = spread(p.gather(1, tokens[layout.rows, layout.offsets][:, None]).squeeze(1), layout)[:, :-1]
    u = spread(uniform(noise_keys(seeds, choices, positions, ACCEPT)), layout)[:, :-1]
    num_accepted = _prefix_length(u * _q_of_drafts(tokens, drafts, layout) < p_draft, drafts)

    last = first_positions(layout) + num_accepted
    rejected = num_accepted < drafts.num_valid
    residual = _residual(p.index_select(0, last), tokens, drafts, num_accepted, rejected)
    keys = noise_keys(batch.seeds, batch.choices, positions.index_select(0, last), RESIDUAL)
    emitted = Processed.dense(residual.log()).sample(keys)
    return _verdict(tokens.scatter(1, num_accepted[:, None], emitted[:, None]), num_accepted)


def _q_of_drafts(tokens: Tensor, drafts: Drafts, layout: Layout) -> Tensor | float:
    """The drafter's probability of each draft token, [R, width - 1]; 1 where drafts are point masses."""
    if drafts.probs is None:
        return 1.0
    num_drafts = layout.width - 1
    return drafts.probs[:, :num_drafts].gather(2, tokens[:, :num_drafts, None]).squeeze(2)


def _residual(p: Tensor, tokens: Tensor, drafts: Drafts, num_accepted: Tensor, rejected: Tensor) -> Tensor:
    """max(p - q, 0) [R, V], unnormalised, where a draft was rejected; p itself for the bonus token after the last."""
    if tokens.shape[1] == 1:
        return p
    at = num_accepted.clamp(max=tokens.shape[1] - 2)
    if drafts.probs is None:
        q = torch.zeros_like(p).scatter_(1, tokens.gather(1, at[:, None]), 1.0)
    else:
        q = drafts.probs[torch.arange(at.shape[0], device=at.device), at]
    residual = (p - q * rejected[:, None]).clamp_(min=0.0)
    # Rounding can leave nothing where p and q all but agree, and then p is the answer.
    return torch.where(residual.amax(-1, keepdim=True) > 0.0, residual, p)


def _prefix_length(accepts: Tensor, drafts: Drafts) -> Tensor:
    """Number [R] of leading accepted drafts; `accepts` [R, k] is meaningless past `num_valid`."""
    is_valid = torch.arange(accepts.shape[1], device=accepts.device) < drafts.num_valid[:, None]
    return (accepts & is_valid).to(torch.int64).cumprod(1).sum(1)


def _verdict(tokens: Tensor, num_accepted: Tensor) -> Verdict:
    return Verdict(tokens=tokens, num_accepted=num_accepted, num_emitted=num_accepted + 1)
