from __future__ import annotations

import pytest
import torch

from server.core import SamplingParams
from server.sampling.state import MIN_TEMPERATURE, SamplingBatch, SamplingState

CPU = torch.device("cpu")


def gather(state: SamplingState, *slots: int) -> SamplingBatch:
    return state.gather(list(slots), torch.tensor(slots))


def test_rows_follow_the_slots_asked_for() -> None:
    state = SamplingState(4, 100, CPU)
    state.set(3, SamplingParams(temperature=0.5, top_k=7, top_p=0.25, min_p=0.125, seed=11), choice=2)
    state.set(
        1, SamplingParams(repetition_penalty=1.5, presence_penalty=-0.5, frequency_penalty=0.75, seed=-5), choice=0
    )
    batch = gather(state, 3, 1)
    assert batch.temperature.tolist() == [0.5, 1.0]
    assert batch.top_k.tolist() == [7, 100]
    assert batch.top_p.tolist() == [0.25, 1.0]
    assert batch.min_p.tolist() == [0.125, 0.0]
    assert batch.repetition_penalty.tolist() == [1.0, 1.5]
    assert batch.presence_penalty.tolist() == [0.0, -0.5]
    assert batch.frequency_penalty.tolist() == [0.0, 0.75]
    assert batch.seeds.tolist() == [11, -5]
    assert batch.choices.tolist() == [2, 0]
    assert batch.greedy.tolist() == [False, False]


def test_flags_are_of_these_rows_only() -> None:
    state = SamplingState(6, 100, CPU)
    state.set(0, SamplingParams(temperature=0.0, top_k=5, top_p=0.5, min_p=0.5), 0)
    state.set(1, SamplingParams(top_k=5, logprobs=0), 0)
    state.set(2, SamplingParams(top_p=0.5, logprobs=3), 0)
    state.set(3, SamplingParams(min_p=0.5, presence_penalty=0.1), 0)
    state.set(4, SamplingParams(repetition_penalty=1.1, logit_bias={1: 2.0}), 0)
    state.set(5, SamplingParams(top_k=100), 0)
    greedy = gather(state, 0)
    assert greedy.all_greedy and greedy.any_greedy and not greedy.any_filter and not greedy.any_penalty
    assert greedy.max_logprobs is None and not greedy.any_bias
    assert gather(state, 0, 1).any_top_k and not gather(state, 0, 1).all_greedy and gather(state, 0, 1).any_greedy
    assert gather(state, 1).max_logprobs == 0 and gather(state, 1, 2).max_logprobs == 3
    assert gather(state, 2).any_top_p and not gather(state, 2).any_top_k and not gather(state, 2).any_greedy
    assert gather(state, 3).any_min_p and gather(state, 3).any_presence_or_frequency
    assert gather(state, 4).any_repetition and gather(state, 4).any_bias and not gather(state, 4).any_filter
    assert not gather(state, 5).any_filter


def test_greedy_rows_have_neutral_filters() -> None:
    batch = SamplingBatch.of([SamplingParams(temperature=0.0, top_k=9, top_p=0.1, min_p=0.9)], 50)
    assert (batch.temperature.item(), batch.top_k.item(), batch.top_p.item(), batch.min_p.item()) == (1.0, 1, 1.0, 0.0)


def test_tiny_temperature_is_bounded() -> None:
    batch = SamplingBatch.of([SamplingParams(temperature=1e-30)], 50)
    assert batch.temperature.item() == pytest.approx(MIN_TEMPERATURE)


@pytest.mark.parametrize(("seed", "stored"), [(2**64 - 1, -1), (2**63, -(2**63)), (-1, -1), (2**63 - 1, 2**63 - 1)])
def test_seeds_are_64_bits_of_either_sign(seed: int, stored: int) -> None:
    assert SamplingBatch.of([SamplingParams(seed=seed)], 5).seeds.item() == stored


def test_bias_grows_and_is_not_inherited() -> None:
    state = SamplingState(3, 5000, CPU)
    state.set(0, SamplingParams(logit_bias={i: float(i) + 1.0 for i in range(1024)}), 0)
    state.set(1, SamplingParams(logit_bias={4999: -100.0}), 0)
    both = gather(state, 0, 1)
    assert both.bias_ids is not None and both.bias_values is not None
    assert both.bias_ids.shape == (2, 1024) and both.bias_values[0].tolist() == [float(i) + 1.0 for i in range(1024)]
    dense = torch.zeros(2, 5000).scatter_add_(1, both.bias_ids, both.bias_values)
    assert dense[1].nonzero().tolist() == [[4999]]
    only = gather(state, 1)
    assert only.bias_ids is not None and only.bias_ids.shape == (1, 1)
    state.clear(0)
    state.set(0, SamplingParams(), 0)
    assert not gather(state, 0).any_bias
    reused = gather(state, 0, 1)
    assert reused.bias_values is not None and reused.bias_values[0].abs().sum() == 0.0


def test_gather_is_free_until_something_changes() -> None:
    state = SamplingState(2, 10, CPU)
    state.set(0, SamplingParams(seed=1), 0)
    first = gather(state, 0)
    assert gather(state, 0) is first
    state.set(0, SamplingParams(seed=2), 0)
    assert gather(state, 0).seeds.item() == 2


def test_errors() -> None:
    state = SamplingState(2, 10, CPU)
    with pytest.raises(KeyError, match="slot 1"):
        gather(state, 1)
    with pytest.raises(ValueError, match="token id 10 is not valid; use 0 to 9"):
        state.set(0, SamplingParams(logit_bias={10: 1.0}), 0)
    state.set(0, SamplingParams(), 0)
    state.clear(0)
    with pytest.raises(KeyError, match="slot 0"):
        gather(state, 0)
