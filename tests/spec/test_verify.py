from __future__ import annotations

import pytest
import torch
from torch import Tensor

from server.core import SamplingParams
from server.sampling.distribution import Processed
from server.sampling.rng import DRAFT, TARGET, noise_keys
from server.sampling.state import SamplingBatch
from server.spec.types import Drafts, Layout, Verdict
from server.spec.verify import _residual, draft_token, verify

V = 20
RULES = ["coupled", "ratio"]
GREEDY = SamplingParams(temperature=0.0)


def padded(num_rows: int, width: int) -> Layout:
    return Layout(
        torch.arange(num_rows).repeat_interleave(width), torch.arange(width).repeat(num_rows), num_rows, width
    )


def randn(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def sampled(num_rows: int) -> SamplingBatch:
    return SamplingBatch.of([SamplingParams(seed=seed) for seed in range(num_rows)], V)


def emitted(verdict: Verdict) -> list[list[int]]:
    return [row[:n] for row, n in zip(verdict.tokens.tolist(), verdict.num_emitted.tolist(), strict=True)]


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("point_mass", [False, True])
def test_greedy_emits_the_argmax_chain(rule: str, point_mass: bool) -> None:
    logits = randn(4, 4, V)
    best = logits.argmax(-1)
    tokens = best[:, :3].clone()
    tokens[1, 0] = (tokens[1, 0] + 1) % V
    tokens[2, 2] = (tokens[2, 2] + 1) % V
    probs = None if point_mass else torch.full((4, 3, V), 1 / V)
    drafts = Drafts(tokens, torch.tensor([3, 3, 3, 1]), probs=probs)
    verdict = verify(Processed.dense(logits.view(16, V)), padded(4, 4), drafts, SamplingBatch.of([GREEDY] * 4, V),
                     torch.arange(4), rule)  # fmt: skip
    assert verdict.num_accepted.tolist() == [3, 0, 2, 1]
    assert verdict.num_emitted.tolist() == [4, 1, 3, 2]
    assert emitted(verdict) == [best[row, :n].tolist() for row, n in enumerate([4, 1, 3, 2])]


@pytest.mark.parametrize("rule", RULES)
def test_greedy_rows_beside_sampled_ones(rule: str) -> None:
    logits = randn(6, 3, V)
    best = logits.argmax(-1)
    params = [GREEDY, SamplingParams(seed=1)] * 3
    tokens = best[:, :2].clone()
    tokens[2, 1] = (tokens[2, 1] + 1) % V
    verdict = verify(Processed.dense(logits.view(18, V)), padded(6, 3), Drafts(tokens, torch.full((6,), 2)),
                     SamplingBatch.of(params, V), torch.arange(6), rule)  # fmt: skip
    for row, length in ((0, 3), (2, 2), (4, 3)):
        assert emitted(verdict)[row] == best[row, :length].tolist()


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("with_probs", [False, True])
def test_ragged_and_padded_agree(rule: str, with_probs: bool) -> None:
    R, k = 200, 3
    logits = randn(R, k + 1, V) * 2
    num_valid = torch.arange(R) % (k + 1)
    q = (logits[:, :k] + randn(R, k, V, seed=1) * 0.3).softmax(-1)
    tokens = q.argmax(-1)
    drafts = Drafts(tokens, num_valid, probs=q if with_probs else None)
    batch, num_tokens = sampled(R), torch.arange(R) * 5
    full = verify(Processed.dense(logits.view(-1, V)), padded(R, k + 1), drafts, batch, num_tokens, rule)
    rows = torch.tensor([r for r in range(R) for _ in range(int(num_valid[r]) + 1)])
    offsets = torch.tensor([j for r in range(R) for j in range(int(num_valid[r]) + 1)])
    ragged = verify(
        Processed.dense(logits[rows, offsets]), Layout(rows, offsets, R, k + 1), drafts, batch, num_tokens, rule
    )
    assert torch.equal(full.num_accepted, ragged.num_accepted)
    assert emitted(full) == emitted(ragged)
    assert bool((full.num_accepted <= num_valid).all())
    assert full.num_accepted.unique().tolist() == [0, 1, 2, 3]
    for verdict in (full, ragged):
        assert verdict.tokens.shape == (R, k + 1)
        assert bool(((verdict.tokens >= 0) & (verdict.tokens < V)).all())


@pytest.mark.parametrize("rule", RULES)
def test_no_drafts_is_plain_sampling(rule: str) -> None:
    logits = randn(50, V)
    drafts = Drafts.none(50, logits.device)
    verdict = verify(Processed.dense(logits), padded(50, 1), drafts, sampled(50), torch.arange(50), rule)
    assert verdict.num_accepted.tolist() == [0] * 50 and verdict.num_emitted.tolist() == [1] * 50
    assert verdict.tokens.shape == (50, 1) and verdict.tokens.unique().numel() > 8


def test_layout_narrower_than_the_drafts_held() -> None:
    """Ragged rows may be no wider than what is valid while `Drafts.tokens` keeps its k columns."""
    logits = randn(2, V)
    drafts = Drafts(torch.zeros(2, 5, dtype=torch.int64), torch.zeros(2, dtype=torch.int64))
    for rule in RULES:
        verdict = verify(Processed.dense(logits), padded(2, 1), drafts, sampled(2), torch.arange(2), rule)
        assert verdict.tokens.shape == (2, 1)


def test_coupled_position_is_absolute() -> None:
    """Offset j after n tokens sees the noise of offset 0 after n + j tokens."""
    logits = randn(1, V).expand(6, V).contiguous()
    batch = sampled(1)
    drafts = Drafts(torch.zeros(1, 5, dtype=torch.int64), torch.tensor([5]))
    window = verify(Processed.dense(logits), padded(1, 6), drafts, batch, torch.tensor([10]), "coupled")
    for j in range(6):
        single = verify(Processed.dense(logits[:1]), padded(1, 1), Drafts.none(1, logits.device), batch,
                        torch.tensor([10 + j]), "coupled")  # fmt: skip
        assert single.tokens[0, 0] == window.tokens[0, j]


def test_choices_and_seeds_differ() -> None:
    logits = randn(1, V).expand(40, V).contiguous() * 0.1
    for params, choices in (([SamplingParams(seed=3)] * 40, list(range(40))),
                            ([SamplingParams(seed=s) for s in range(40)], [0] * 40)):  # fmt: skip
        batch = SamplingBatch.of(params, V, choices)
        verdict = verify(Processed.dense(logits), padded(40, 1), Drafts.none(40, logits.device), batch,
                         torch.zeros(40, dtype=torch.int64), "coupled")  # fmt: skip
        assert verdict.tokens.unique().numel() > 10


def test_ratio_certain_cases() -> None:
    """p >= q at the draft: always accepted. p = 0: never, and the residual can not give it either."""
    R = 500
    p = torch.zeros(R, 2, V)
    p[:, :, 3], p[:, :, 4] = 0.75, 0.25
    q = torch.zeros(R, 1, V)
    q[:, :, 4], q[:, :, 9] = 0.2, 0.8
    tokens = torch.where(torch.arange(R) % 2 == 0, 4, 9)[:, None]
    drafts = Drafts(tokens, torch.ones(R, dtype=torch.int64), probs=q)
    verdict = verify(Processed.dense(p.log().view(-1, V)), padded(R, 2), drafts, sampled(R), torch.arange(R), "ratio")
    assert verdict.num_accepted.tolist() == [1, 0] * (R // 2)
    assert set(verdict.tokens[1::2, 0].tolist()) == {3, 4}


def test_ratio_where_the_residual_vanishes() -> None:
    """Rounding may leave p <= q everywhere though a draft was rejected: the answer is p, never a filtered token."""
    p = torch.tensor([[0.5, 0.5, 0.0]])
    drafts = Drafts(torch.tensor([[0]]), torch.tensor([1]), probs=torch.tensor([[[0.5, 0.5, 0.0]]]))
    assert torch.equal(_residual(p, torch.tensor([[0, 0]]), drafts, torch.tensor([0]), torch.tensor([True])), p)


def test_unknown_rule() -> None:
    logits = randn(1, V)
    with pytest.raises(ValueError, match="use one of coupled, ratio"):
        verify(
            Processed.dense(logits), padded(1, 1), Drafts.none(1, logits.device), sampled(1), torch.tensor([0]), "lossy"
        )
    with pytest.raises(ValueError, match="use one of coupled, ratio"):
        draft_token(Processed.dense(logits), sampled(1), torch.tensor([0]), "lossy")


def test_coupled_drafts_share_the_targets_noise() -> None:
    logits = randn(300, V)
    batch, positions = sampled(300), torch.arange(300)
    drawn, q = draft_token(Processed.dense(logits), batch, positions, "coupled")
    assert q is None
    verdict = verify(
        Processed.dense(logits), padded(300, 1), Drafts.none(300, logits.device), batch, positions, "coupled"
    )
    assert torch.equal(verdict.tokens[:, 0], drawn)


def test_ratio_drafts_have_noise_of_their_own_and_report_q() -> None:
    logits = randn(300, V)
    batch, positions = sampled(300), torch.arange(300)
    drawn, q = draft_token(Processed.dense(logits), batch, positions, "ratio")
    keys = noise_keys(batch.seeds, batch.choices, positions, DRAFT)
    assert torch.equal(drawn, Processed.dense(logits).sample(keys))
    assert not torch.equal(
        drawn, Processed.dense(logits).sample(noise_keys(batch.seeds, batch.choices, positions, TARGET))
    )
    assert q is not None
    torch.testing.assert_close(q, logits.softmax(-1))


@pytest.mark.parametrize("rule", RULES)
def test_greedy_drafts(rule: str) -> None:
    logits = randn(4, V)
    assert draft_token(Processed.dense(logits), SamplingBatch.of([GREEDY] * 4, V), torch.arange(4), rule)[1] is None
    drawn, q = draft_token(
        Processed.dense(logits), SamplingBatch.of([GREEDY, SamplingParams()] * 2, V), torch.arange(4), rule
    )
    assert torch.equal(drawn[::2], logits.argmax(-1)[::2])
    if rule == "ratio":
        assert q is not None
        assert torch.equal(q[::2], torch.nn.functional.one_hot(drawn[::2], V).float())


@pytest.mark.parametrize("rule", RULES)
def test_reduced_draft_vocabulary(rule: str) -> None:
    """Noise and q go by the target's ids."""
    ids = torch.tensor([17, 3, 8, 0])
    logits = randn(200, 4)
    batch, positions = sampled(200), torch.arange(200)
    drawn, q = draft_token(Processed(logits, V), batch, positions, rule, vocab_ids=ids)
    full = torch.full((200, V), -float("inf"))
    full[:, ids] = logits
    expected, expected_q = draft_token(Processed.dense(full), batch, positions, rule)
    assert torch.equal(drawn, expected)
    if rule == "ratio":
        assert q is not None and expected_q is not None
        torch.testing.assert_close(q, expected_q)
