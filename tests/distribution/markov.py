"""A tiny language model whose joint distribution can be written down, and the verify step that serves it.

The target is a random table of logits over V tokens given the last two. `joint` computes, by the definition of each
filter and penalty and in float64 without any product code, the exact distribution of the first emitted tokens.
`simulate` runs the production drafting, processing and verification over many trials at once, one row a trial.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from scipy import stats
from torch import Tensor

from draft_models.hybrid_device import CopyingSampler
from server.core import SamplingParams
from server.sampling.distribution import Processed
from server.sampling.process import process
from server.sampling.state import SamplingBatch, SamplingState
from server.spec.types import Drafts, Layout, SlotState, Verdict
from server.spec.verify import draft_token, verify

V = 6
LENGTH = 4  # emitted tokens under test
Array = NDArray[Any]
PROMPT = (1, 4, 2)
Verifier = Callable[[Processed, Layout, Drafts, SamplingBatch, Tensor, str], Verdict]


def target_table() -> Tensor:
    """Logits [V, V, V] of the next token given the last two; peaked as a language model's are."""
    return torch.randn(V, V, V, generator=torch.Generator().manual_seed(7)) * 1.2


def drafter_table(kind: str) -> Tensor:
    """Drafters from good to hostile."""
    target = target_table()
    noise = torch.randn(V, V, V, generator=torch.Generator().manual_seed(11))
    return {
        "good": target + 0.4 * noise,
        "wrong": 1.5 * noise,
        "shifted": target.roll(1, dims=-1),
        "point": target + 0.8 * noise,
        "mixed": target + 0.4 * noise,  # where it does not copy
        "avoids": -4.0 * target,  # near zero wherever the target is likely
    }[kind]


@dataclass(frozen=True)
class Case:
    """One experiment. `masked` hides a random number of each row's drafts, as a padded batch does."""

    rule: str
    drafter: str
    params: SamplingParams
    k: int = 2
    masked: bool = False

    def __str__(self) -> str:
        return f"{self.rule}-{self.drafter}-k{self.k}"


def simulate(case: Case, num_trials: int, verifier: Verifier = verify) -> Array:
    """The first LENGTH emitted tokens of every trial, [N, LENGTH]; trial n has seed n."""
    n, k = num_trials, case.k
    target, drafter = target_table(), drafter_table(case.drafter)
    batch, slot_ids = seeded_batch(case.params, n), torch.arange(n)
    history = torch.full((n, len(PROMPT) + LENGTH + k + 1), V - 1)
    history[:, : len(PROMPT)] = torch.tensor(PROMPT)
    prompt_len = torch.full((n,), len(PROMPT))
    state = SlotState(history, prompt_len.clone(), prompt_len)
    valid_choices = torch.Generator().manual_seed(5)
    while int(state.num_tokens.min()) < len(PROMPT) + LENGTH:
        full = torch.full((n,), k)
        num_valid = torch.randint(0, k + 1, (n,), generator=valid_choices) if case.masked else full
        drafts = propose(case, drafter, batch, state, slot_ids, num_valid)
        layout = Layout(slot_ids.repeat_interleave(k + 1), torch.arange(k + 1).repeat(n), n, k + 1)
        logits = target[contexts(state, drafts.tokens).unbind(-1)].view(n * (k + 1), V)
        processed = process(logits, layout, drafts, batch, state, slot_ids, history.shape[1])
        verdict = verifier(processed, layout, drafts, batch, state.num_tokens, case.rule)
        assert torch.equal(verdict.num_emitted, verdict.num_accepted + 1), (
            "every step emits one token beyond the drafts"
        )
        assert bool((verdict.num_accepted <= num_valid).all()), "a masked draft was accepted"
        commit(state, verdict)
    return history[:, len(PROMPT) : len(PROMPT) + LENGTH].numpy()


def seeded_batch(params: SamplingParams, num_rows: int) -> SamplingBatch:
    """All rows sample by `params`, row n with seed n."""
    sampling = SamplingState(1, V, torch.device("cpu"))
    sampling.set(0, params, choice=0)
    batch = sampling.gather([0] * num_rows, torch.zeros(num_rows, dtype=torch.int64))
    return replace(batch, seeds=torch.arange(num_rows))


def contexts(state: SlotState, drafts: Tensor) -> Tensor:
    """The last two tokens before each of the 1 + k offsets, [N, 1 + k, 2]."""
    last = state.num_tokens[:, None] + torch.tensor([-2, -1])
    stream = torch.cat([state.history.gather(1, last), drafts], 1)
    return stream.unfold(1, 2, 1)


def propose(
    case: Case, drafter: Tensor, batch: SamplingBatch, state: SlotState, slot_ids: Tensor, num_valid: Tensor
) -> Drafts:
    """k drafts a row, drawn by the production sampler from the drafter's processed logits."""
    n = slot_ids.shape[0]
    tokens, probs = torch.zeros(n, 0, dtype=torch.int64), []

    def draw(logits: Tensor, step: Any, positions: Any, vocab_ids: Any) -> tuple[Tensor, Tensor | None]:
        j = tokens.shape[1]
        layout, so_far = Layout(slot_ids, torch.full((n,), j), n, 1), Drafts(tokens, torch.full((n,), j))
        processed = process(logits, layout, so_far, batch, state, slot_ids, state.history.shape[1])
        return draft_token(processed, batch, state.num_tokens + j, case.rule)

    sampler = CopyingSampler(draw)
    if case.drafter == "mixed":
        sampler.begin(*copies(state, case.k))
    for j in range(case.k):
        logits = drafter[contexts(state, tokens)[:, -1].unbind(-1)]
        if case.drafter == "point":
            drawn = logits.argmax(-1)
        else:
            drawn, q = sampler(logits, None, state.num_tokens + j, None)  # type: ignore[arg-type]
            probs += [] if q is None else [q]
        tokens = torch.cat([tokens, drawn[:, None]], 1)
    hidden = torch.arange(case.k) >= num_valid[:, None]
    tokens = tokens.masked_fill(hidden, 0)
    return Drafts(
        tokens, num_valid, probs=torch.stack(probs, 1).masked_fill(hidden[:, :, None], 0.0) if probs else None
    )


def copies(state: SlotState, k: int) -> tuple[Tensor, Tensor]:
    """What a hybrid drafter copies [N, k] and where [N, k]: none, some or all of a row, as its known tokens say."""
    last, before = (state.history.gather(1, state.num_tokens[:, None] - n)[:, 0] for n in (1, 2))
    steps = torch.arange(k)
    return (last[:, None] + before[:, None] * steps) % V, steps < ((last + 2 * before) % (k + 1))[:, None]


def commit(state: SlotState, verdict: Verdict) -> None:
    """Append what was emitted, as far as it fits into the history under test."""
    width = verdict.tokens.shape[1]
    at = state.num_tokens[:, None] + torch.arange(width)
    emitted = torch.arange(width) < verdict.num_emitted[:, None]
    at = at.clamp(max=state.history.shape[1] - 1)
    old = state.history.gather(1, at)
    state.history.scatter_(1, at, torch.where(emitted, verdict.tokens, old))
    state.num_tokens = (state.num_tokens + verdict.num_emitted).clamp(max=len(PROMPT) + LENGTH)


def next_token_probs(output: tuple[int, ...], params: SamplingParams) -> Array:
    """Distribution [V] after PROMPT and `output`, from the definitions."""
    stream = PROMPT + output
    logits = target_table()[stream[-2], stream[-1]].double().numpy().copy()
    for token in range(V):
        if token in stream:
            penalty = params.repetition_penalty
            logits[token] = logits[token] / penalty if logits[token] > 0 else logits[token] * penalty
        if token in output:
            logits[token] -= params.presence_penalty + params.frequency_penalty * output.count(token)
        logits[token] += params.logit_bias.get(token, 0.0)
    if params.greedy:
        one_hot: Array = np.eye(V)[logits.argmax()]
        return one_hot
    probs = _softmax(logits / params.temperature)
    order = np.argsort(-probs)
    if params.top_k:
        probs[order[params.top_k :]] = 0.0
        probs /= probs.sum()
    if params.top_p < 1.0:
        before = np.cumsum(probs[order]) - probs[order]
        probs[order[before >= params.top_p]] = 0.0
    probs[probs < params.min_p * probs.max()] = 0.0
    normalised: Array = probs / probs.sum()
    return normalised


def _softmax(x: Array) -> Array:
    e = np.exp(x - x.max())
    probs: Array = e / e.sum()
    return probs


def joint(params: SamplingParams) -> Array:
    """Exact probability [V] * LENGTH of every sequence of LENGTH emitted tokens."""
    full = np.ones((V,) * LENGTH)
    for length in range(LENGTH):
        for output in itertools.product(range(V), repeat=length):
            probs = next_token_probs(output, params)
            full[output] *= probs.reshape((V,) + (1,) * (LENGTH - length - 1))
    return full


def p_value(tokens: Array, exact: Array) -> float:
    """Smallest chi-square p-value over single positions, pairs, triples and the whole; Bonferroni-corrected."""
    counts = np.zeros(exact.shape)
    np.add.at(counts, tuple(tokens.T), 1)
    subsets = [s for size in range(1, LENGTH + 1) for s in itertools.combinations(range(LENGTH), size)]
    values = []
    for subset in subsets:
        rest = tuple(axis for axis in range(LENGTH) if axis not in subset)
        values.append(_chi_square(counts.sum(rest).ravel(), exact.sum(rest).ravel() * len(tokens)))
    return min(1.0, min(values) * len(subsets))


def _chi_square(observed: Array, expected: Array) -> float:
    if observed[expected == 0.0].sum() > 0:
        return 0.0  # a token that the filters forbid
    rare = expected < 10.0
    observed = np.append(observed[~rare], observed[rare].sum())
    expected = np.append(expected[~rare], expected[rare].sum())
    keep = expected > 0.0
    if keep.sum() < 2:
        return 1.0
    statistic = ((observed[keep] - expected[keep]) ** 2 / expected[keep]).sum()
    return float(stats.chi2.sf(statistic, keep.sum() - 1))
