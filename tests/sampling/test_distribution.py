from __future__ import annotations

import pytest
import torch

from server.sampling.distribution import Processed
from server.sampling.rng import TARGET, noise_keys


@pytest.mark.parametrize("vocab_size", [5, 256, 1000, 1024])
def test_argmax_is_torchs_first_among_equals(vocab_size: int) -> None:
    logits = torch.randint(0, 40, (50, vocab_size), generator=torch.Generator().manual_seed(0)).float()
    assert torch.equal(Processed.dense(logits).argmax(), logits.argmax(-1))


def candidates(logits: torch.Tensor, num: int) -> Processed:
    values, ids = logits.topk(num)
    order = torch.randperm(num, generator=torch.Generator().manual_seed(1))
    return Processed(values[:, order], logits.shape[1], ids[:, order])


def test_candidates_are_the_same_distribution() -> None:
    logits = torch.randn(20, 300, generator=torch.Generator().manual_seed(0))
    few = candidates(logits, 30)
    dense = Processed.dense(few.to_dense())
    n = torch.arange(20)
    keys = noise_keys(n, n, n, TARGET)
    assert dense.logits.isfinite().sum(1).tolist() == [30] * 20
    assert torch.equal(few.sample(keys), dense.sample(keys))
    assert torch.equal(few.argmax(), dense.argmax())
    torch.testing.assert_close(few.probs(), dense.probs())
    greedy = n % 2 == 0
    torch.testing.assert_close(few.probs(greedy), dense.probs(greedy))
    assert few.probs(greedy).amax(1)[greedy].tolist() == [1.0] * 10


def test_ties_among_candidates_go_to_the_lowest_id() -> None:
    processed = Processed(torch.tensor([[1.0, 3.0, 3.0]]), 9, torch.tensor([[0, 8, 4]]))
    assert processed.argmax().tolist() == [4]


def test_greedy_rows_get_no_noise() -> None:
    logits = torch.zeros(400, 8)
    n = torch.arange(400)
    greedy = n < 200
    tokens = Processed.dense(logits).sample(noise_keys(n, n, n, TARGET), greedy)
    assert tokens[:200].unique().tolist() == [0]
    assert tokens[200:].unique().numel() == 8


def test_filtered_tokens_are_never_drawn() -> None:
    logits = torch.full((2000, 8), -float("inf"))
    logits[:, 3] = -50.0
    n = torch.arange(2000)
    assert Processed.dense(logits).sample(noise_keys(n, n, n, TARGET)).unique().tolist() == [3]
