"""The test of exactness can fail: each classic mistake of a verifier is found by the very same statistic."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch

from server.core import SamplingParams
from server.sampling import penalties, rng, rows
from server.spec import verify as verification
from server.spec.types import Verdict
from tests.distribution.markov import Case, joint, p_value, simulate

TRIALS = 60_000
CERTAIN = 1e-9
PLAIN = SamplingParams()
PENALISED = SamplingParams(presence_penalty=0.8, frequency_penalty=0.5)


def p_of(case: Case, verifier: Any = verification.verify) -> float:
    return p_value(simulate(case, TRIALS, verifier), joint(case.params))


@pytest.mark.parametrize("rule", ["coupled", "ratio"])
def test_noise_reused_across_positions(rule: str, monkeypatch: pytest.MonkeyPatch) -> None:
    def keys(seeds: Any, choices: Any, positions: Any, purpose: int) -> Any:
        return rng.noise_keys(seeds, choices, torch.zeros_like(positions), purpose)

    monkeypatch.setattr(verification, "noise_keys", keys)
    assert p_of(Case(rule, "good", PLAIN)) < CERTAIN


def test_noise_reused_across_positions_leaves_the_first_position_right(monkeypatch: pytest.MonkeyPatch) -> None:
    """Why joint tests are needed: the marginal of a position by itself can look perfect."""
    case = Case("coupled", "good", PLAIN, k=0)

    def keys(seeds: Any, choices: Any, positions: Any, purpose: int) -> Any:
        return rng.noise_keys(seeds, choices, torch.zeros_like(positions), purpose)

    monkeypatch.setattr(verification, "noise_keys", keys)
    tokens = simulate(case, TRIALS)
    counts = torch.bincount(torch.from_numpy(tokens[:, 0])).double() / TRIALS
    assert (counts - torch.from_numpy(joint(PLAIN).sum((1, 2, 3)))).abs().max() < 0.01
    assert p_value(tokens, joint(PLAIN)) < CERTAIN


@pytest.mark.parametrize("purpose", [rng.ACCEPT, rng.RESIDUAL])
def test_draft_noise_used_again(purpose: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Accepting, or sampling the residual, by the noise that drew the draft."""

    def keys(seeds: Any, choices: Any, positions: Any, wanted: int) -> Any:
        return rng.noise_keys(seeds, choices, positions, rng.DRAFT if wanted == purpose else wanted)

    def uniform_of_draft_noise(draft_keys: Any) -> Any:
        return torch.exp(-torch.exp(-rng.gumbel(draft_keys, 1).double())).squeeze(1)

    monkeypatch.setattr(verification, "noise_keys", keys)
    if purpose == rng.ACCEPT:
        monkeypatch.setattr(verification, "uniform", uniform_of_draft_noise)
    assert p_of(Case("ratio", "wrong", PLAIN)) < CERTAIN


@pytest.mark.parametrize("rule", ["coupled", "ratio"])
def test_position_one_short_after_every_step(rule: str) -> None:
    """As if the bonus token were not counted: the next step begins with the noise that drew it."""
    num_steps = 0

    def verifier(processed: Any, layout: Any, drafts: Any, batch: Any, num_tokens: Any, rule: str) -> Verdict:
        nonlocal num_steps
        num_steps += 1
        return verification.verify(processed, layout, drafts, batch, num_tokens - num_steps, rule)

    assert p_of(Case(rule, "wrong", PLAIN), verifier) < CERTAIN


def test_draft_compared_with_its_neighbour(monkeypatch: pytest.MonkeyPatch) -> None:
    def match(target: Any, layout: Any, drafts: Any) -> Verdict:
        tokens = rows.spread(target, layout)
        agrees = tokens[:, 1:] == drafts.tokens
        accepted = verification._prefix_length(agrees, drafts)
        padded = torch.nn.functional.pad(drafts.tokens, (0, 1))
        kept = torch.arange(tokens.shape[1]) < accepted[:, None]
        return verification._verdict(torch.where(kept, padded, tokens), accepted)

    monkeypatch.setattr(verification, "_match", match)
    assert p_of(Case("coupled", "good", PLAIN)) < CERTAIN


@pytest.mark.parametrize("rule", ["coupled", "ratio"])
def test_bonus_token_dropped(rule: str) -> None:
    """Nothing is sampled after the last accepted draft, and its place shows the padding."""

    def verifier(*args: Any) -> Verdict:
        verdict = verification.verify(*args)
        full = verdict.num_accepted == args[2].tokens.shape[1]
        last = verdict.tokens[:, -1].masked_fill(full, 0)
        return replace(verdict, tokens=torch.cat([verdict.tokens[:, :-1], last[:, None]], 1))

    assert p_of(Case(rule, "good", PLAIN), verifier) < CERTAIN


@pytest.mark.parametrize("rule", ["coupled", "ratio"])
def test_bonus_token_not_counted(rule: str) -> None:
    def verifier(*args: Any) -> Verdict:
        verdict = verification.verify(*args)
        full = verdict.num_accepted == args[2].tokens.shape[1]
        return replace(verdict, num_emitted=verdict.num_emitted - full.long())

    with pytest.raises(AssertionError, match="one token beyond the drafts"):
        p_of(Case(rule, "good", PLAIN), verifier)


@pytest.mark.parametrize("drafter", ["wrong", "point"])
def test_residual_without_subtraction(drafter: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(verification, "_residual", lambda p, *_: p)
    assert p_of(Case("ratio", drafter, PLAIN)) < CERTAIN


def test_residual_in_place_of_the_bonus_distribution(monkeypatch: pytest.MonkeyPatch) -> None:
    residual = verification._residual

    def always_rejected(p: Any, tokens: Any, drafts: Any, num_accepted: Any, rejected: Any) -> Any:
        return residual(p, tokens, drafts, num_accepted, torch.ones_like(rejected))

    monkeypatch.setattr(verification, "_residual", always_rejected)
    assert p_of(Case("ratio", "good", PLAIN)) < CERTAIN


def test_q_of_another_draft() -> None:
    """Acceptance by the q of the neighbouring position."""

    def verifier(processed: Any, layout: Any, drafts: Any, *rest: Any) -> Verdict:
        return verification.verify(processed, layout, replace(drafts, probs=drafts.probs.roll(1, 1)), *rest)

    assert p_of(Case("ratio", "wrong", PLAIN), verifier) < CERTAIN


@pytest.mark.parametrize("rule", ["coupled", "ratio"])
def test_penalties_once_per_window(rule: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(penalties, "_count_drafts", lambda before: torch.zeros(before.shape, dtype=torch.int64))
    assert p_of(Case(rule, "good", PENALISED)) < CERTAIN


def test_masked_drafts_taken_for_real(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(verification, "_prefix_length", lambda accepts, _: accepts.long().cumprod(1).sum(1))
    with pytest.raises(AssertionError, match="masked draft"):
        p_of(Case("ratio", "good", PLAIN, masked=True))
