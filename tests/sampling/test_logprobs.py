from __future__ import annotations

import torch

from server.core import SamplingParams
from server.sampling.distribution import Processed
from server.sampling.logprobs import emitted_logprobs, score
from server.sampling.state import SamplingBatch
from server.spec.types import Drafts, Layout
from server.spec.verify import verify

V = 12


def test_accepted_drafts_and_bonus_are_scored_by_the_raw_target() -> None:
    """Not 0.0 for an accepted draft, not the processed distribution, not the neighbour's position."""
    raw = torch.randn(8, V, generator=torch.Generator().manual_seed(0))
    best = raw.argmax(-1).view(2, 4)
    drafts = Drafts(best[:, :3].clone(), torch.tensor([3, 3]))
    drafts.tokens[1, 1] = (best[1, 1] + 1) % V
    layout = Layout(torch.arange(2).repeat_interleave(4), torch.arange(4).repeat(2), 2, 4)
    batch = SamplingBatch.of([SamplingParams(temperature=0.0)] * 2, V)
    verdict = verify(Processed.dense(raw * 3.0), layout, drafts, batch, torch.tensor([5, 6]), "coupled")
    assert verdict.num_emitted.tolist() == [4, 2]

    got = emitted_logprobs(raw, layout, verdict, num_top=3)
    assert got.chosen.shape == (2, 4) and got.top_ids.shape == got.top_logprobs.shape == (2, 4, 3)
    expected = raw.log_softmax(-1).view(2, 4, V)
    for row, emitted in enumerate(verdict.num_emitted.tolist()):
        for j in range(emitted):
            assert got.chosen[row, j] == expected[row, j, verdict.tokens[row, j]]
            assert got.top_ids[row, j].tolist() == expected[row, j].argsort(descending=True)[:3].tolist()
            assert torch.equal(got.top_logprobs[row, j], expected[row, j].sort(descending=True).values[:3])
    assert bool((got.chosen < 0).all())


def test_ragged_rows_and_no_alternatives() -> None:
    raw = torch.randn(3, V, generator=torch.Generator().manual_seed(1))
    layout = Layout(torch.tensor([0, 1, 1]), torch.tensor([0, 0, 1]), 2, 2)
    drafts = Drafts(raw.argmax(-1)[[0, 1]][:, None], torch.tensor([0, 1]))
    batch = SamplingBatch.of([SamplingParams(temperature=0.0)] * 2, V)
    verdict = verify(Processed.dense(raw), layout, drafts, batch, torch.tensor([5, 6]), "coupled")
    got = emitted_logprobs(raw, layout, verdict, num_top=0)
    assert got.top_ids.shape == (2, 2, 0)
    best = raw.log_softmax(-1).amax(-1)
    assert got.chosen[0, 0] == best[0] and torch.equal(got.chosen[1], best[1:])


def test_more_alternatives_than_tokens() -> None:
    raw = torch.randn(1, V)
    layout = Layout(torch.tensor([0]), torch.tensor([0]), 1, 1)
    batch = SamplingBatch.of([SamplingParams(temperature=0.0)], V)
    verdict = verify(Processed.dense(raw), layout, Drafts.none(1, raw.device), batch, torch.tensor([5]), "coupled")
    assert emitted_logprobs(raw, layout, verdict, num_top=20).top_ids.shape == (1, 1, V)


def test_given_tokens_are_scored_one_a_position() -> None:
    raw = torch.randn(5, V, generator=torch.Generator().manual_seed(2))
    tokens = torch.tensor([3, 0, 11, 3, 7])
    got = score(raw, tokens, 2)
    expected = raw.double().log_softmax(-1)
    torch.testing.assert_close(got.chosen.double(), expected[torch.arange(5), tokens])
    assert got.top_ids.tolist() == raw.topk(2).indices.tolist()
    torch.testing.assert_close(got.top_logprobs.double(), expected.topk(2).values)
